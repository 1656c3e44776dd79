/* Packed weights, (out, in): dot products with their rows.
 *
 * Weights are unpacked in registers and used for up to TOKENS pairs. Products and sums are those of floats: of a group
 * first, times its scale then, so that nothing is rounded that the format does not round. */

/* A row of packed weights with its scales. */
typedef struct {
    const uint8_t *weights, *scales, *zeros;
    float row_scale;
} PackedRow;

/* Rows of a block, and what is fetched while they are read: bytes `lead` further on in `near`, or in `far` behind its end. */
typedef struct {
    PackedRow rows[ROWS];
    const uint8_t *near[ROWS], *far[ROWS];
    int64_t lead;
} PackedBlock;

/* Scales or zeros of LANES groups, of which `count` are there. */
INLINE vf groups_at(const uint8_t *p, int64_t count, const bool are_zeros, int scale_kind) {
    uint8_t some[4 * LANES];
    if (count < LANES) { /* what is behind them need not be memory */
        const int64_t bytes = count * (are_zeros ? 1 : scale_bytes(scale_kind));
#if WIDE_STEPS
        _mm512_storeu_si512(some, _mm512_maskz_loadu_epi8((1ull << bytes) - 1, p));
#else
        memset(some, 0, sizeof some);
        memcpy(some, p, bytes);
#endif
        p = some;
    }
    /* Weights are unpacked as q - 8. */
    return are_zeros ? __builtin_convertvector(bytes_from(p), vf) - 8 : scales_at(p, scale_kind);
}

/* Which of LANES groups each lane of a block is of, with the first group of the block as 0. */
INLINE vi groups_of_lanes(int shift, const int kind) {
    vi lanes;
    for (int i = 0; i < LANES; i++) {
        lanes[i] = VECTORS * i;
    }
    return has_nibbles(kind) && shift < 31 ? lanes >> shift : (vi){0};
}

/* sums += dot products of R rows with N pairs, for `count` blocks whose scales are all at hand.
 *
 * `next` is fetched; `group` is the first block's among those in scales and zeros. */
INLINE void add_blocks(const uint8_t *const *w, const uint8_t *const *next, const float *const *x, int64_t count,
                       int shift, vi lane_groups, int64_t within, const vf *scales, const vf *zeros, const int kind,
                       const bool has_groups, const bool has_zeros, const int R, const int N,
                       vf (*sums)[TOKENS], vu *full) {
    const int64_t block_bytes = bytes_of(kind, BLOCK);
    vf local[ROWS][TOKENS];
    for (int r = 0; r < R; r++) {
        for (int n = 0; n < N; n++) {
            local[r][n] = sums[r][n];
        }
    }
    for (int64_t i = 0; i < count; i++) {
        Block b[ROWS];
        vf parts[ROWS][TOKENS], company[TOKENS]; /* company: sums of inputs, lane by lane, that zeros are times of */
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(next[r] + i * block_bytes, 0, 3);
            if (block_bytes > 64) {
                __builtin_prefetch(next[r] + i * block_bytes + 64, 0, 3);
            }
            b[r] = block_at(w[r] + i * block_bytes, kind);
            if (kind == E4M3) {
                full[r] |= has_full_e4m3(b[r].bytes);
            }
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                parts[r][n] = has_groups ? (vf){0} : local[r][n];
                company[n] = (vf){0};
            }
        }
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) {
            vf inputs[TOKENS];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                inputs[n] = *(const vf_at *)(x[n] + i * BLOCK + j * LANES);
                if (has_zeros) {
                    company[n] += inputs[n];
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const vf weights = weights_of(&b[r], kind, j);
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) {
                    parts[r][n] += weights * inputs[n];
                }
            }
        }
        const vi index = lane_groups + (int32_t)((within + i * BLOCK) >> shift);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const vf scale = has_groups ? picked(scales[r], index) : (vf){0};
            const vf zero = has_zeros ? picked(zeros[r], index) : (vf){0};
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                if (has_zeros) {
                    parts[r][n] -= zero * company[n];
                }
                local[r][n] = has_groups ? local[r][n] + parts[r][n] * scale : parts[r][n];
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int n = 0; n < N; n++) {
            sums[r][n] = local[r][n];
        }
    }
}

/* R x N dot products over `width` weights, for rows of a block from the first on. */
INLINE void packed_dots(const PackedBlock *block, const int first, const float *const *inputs, const Packing *p,
                        int64_t width, const int kind, const bool has_groups, const bool has_zeros, const int R,
                        const int N, float (*result)[TOKENS]) {
    const PackedRow *rows = block->rows + first;
    vf sums[ROWS][TOKENS] = {0};
    vu full[ROWS] = {0};
    vf scales[ROWS] = {0}, zeros[ROWS] = {0}; /* of LANES groups each */
    const int shift = has_groups ? __builtin_ctzll((uint64_t)p->group) : 62;
    const vi lane_groups = groups_of_lanes(shift, kind);
    const int64_t num_groups = ((width - 1) >> shift) + 1;
    /* Weights whose scales are at hand together: those of LANES groups, or all. */
    const int64_t span = shift < 32 ? (int64_t)LANES << shift : (int64_t)1 << 62;
    const int64_t row_bytes = bytes_of(kind, width), whole = width - width % BLOCK;
    /* From here on `far` is fetched instead of `near`. */
    const int64_t turn = (row_bytes - block->lead) / bytes_of(kind, BLOCK) * BLOCK;
    uint8_t rest[ROWS][BLOCK];
    for (int64_t k = 0; k < width;) {
        const int64_t within = k & (span - 1);
        if (has_groups && within == 0) {
            const int64_t group = k >> shift;
            for (int r = 0; r < R; r++) {
                const uint8_t *from = rows[r].scales + group * scale_bytes(p->scale_kind);
                scales[r] = groups_at(from, num_groups - group, false, p->scale_kind);
                if (has_zeros) {
                    zeros[r] = groups_at(rows[r].zeros + group, num_groups - group, true, 0);
                }
            }
        }
        const int64_t at = bytes_of(kind, k);
        const uint8_t *w[ROWS], *next[ROWS];
        const float *x[TOKENS];
        for (int r = 0; r < R; r++) {
            w[r] = rows[r].weights + at;
            next[r] = k < turn ? block->near[first + r] + at + block->lead
                               : block->far[first + r] + at + block->lead - row_bytes;
            if (k == whole) { /* less than a block is left: zeros follow */
                memset(rest[r], 0, BLOCK);
                w[r] = memcpy(rest[r], w[r], row_bytes - at);
            }
        }
        for (int n = 0; n < N; n++) {
            x[n] = inputs[n] + k;
        }
        const int64_t end = least(k < turn ? turn : k < whole ? whole : k + BLOCK, k - within + span);
        add_blocks(w, next, x, (end - k) / BLOCK, shift, lane_groups, within, scales, zeros, kind, has_groups,
                   has_zeros, R, N, sums, full);
        k = end;
    }
    for (int r = 0; r < R; r++) {
        const bool is_nan = kind == E4M3 && any_full(full[r]);
        const float unit = unit_of(kind) * rows[r].row_scale;
        for (int n = 0; n < N; n++) {
            result[first + r][n] = is_nan ? float_of(0x7fc00000u) : sum_lanes(sums[r][n]) * unit;
        }
    }
}

/* As many rows at a time as leave sums and parts of sums in registers. */
#define ROWS_FOR(N) (N == 1 || (N == 2 && LANES == 16) ? ROWS : ROWS / 2)

#define PACKED_DOTS(N, NAME, KIND, GROUPS, ZEROS)                                                                      \
    __attribute__((noinline)) static void NAME##_##N(const PackedBlock *block, const float *const *x,                 \
                                                     const Packing *p, int64_t width, float (*result)[TOKENS]) {      \
        for (int first = 0; first < ROWS; first += ROWS_FOR(N)) {                                                     \
            packed_dots(block, first, x, p, width, KIND, GROUPS, ZEROS, ROWS_FOR(N), N, result);                   \
        }                                                                                                             \
    }
#define PACKED_DOTS_OF(NAME, KIND, GROUPS, ZEROS)                                                               \
    PACKED_DOTS(1, NAME, KIND, GROUPS, ZEROS)                                                                  \
    PACKED_DOTS(2, NAME, KIND, GROUPS, ZEROS)                                                                  \
    PACKED_DOTS(3, NAME, KIND, GROUPS, ZEROS)                                                                  \
    PACKED_DOTS(4, NAME, KIND, GROUPS, ZEROS)                                                                  \
    static const PackedDots NAME[TOKENS] = {NAME##_1, NAME##_2, NAME##_3, NAME##_4};

typedef void (*PackedDots)(const PackedBlock *, const float *const *, const Packing *, int64_t, float (*)[TOKENS]);
PACKED_DOTS_OF(int8_rows, INT8, false, false)
PACKED_DOTS_OF(int8_groups, INT8, true, false)
PACKED_DOTS_OF(e4m3_rows, E4M3, false, false)
PACKED_DOTS_OF(e4m3_groups, E4M3, true, false)
PACKED_DOTS_OF(int4_groups, INT4, true, false)
PACKED_DOTS_OF(int4_zeros, INT4, true, true)
PACKED_DOTS_OF(e2m1_groups, E2M1, true, false)

/* By the number of pairs of token and expert, less one. */
INLINE const PackedDots *packed_dots_of(const Packing *p) {
    switch (p->kind) {
    case INT8: return p->scale < 0 ? int8_rows : int8_groups;
    case E4M3: return p->scale < 0 ? e4m3_rows : e4m3_groups;
    case INT4: return p->zero < 0 ? int4_groups : int4_zeros;
    default: return e2m1_groups;
    }
}
