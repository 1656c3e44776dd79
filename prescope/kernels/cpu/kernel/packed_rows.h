/* Packed weights, (out, in): dot products with their rows.
 *
 * Weights are unpacked in registers and used for up to TOKENS pairs. Products and sums are those of floats: of a group
 * first, times its scale then, so that nothing is rounded that the format does not round. */

#define SEGMENT 4096 /* weights of a row whose scales are widened at a time */
#define MOST_GROUPS (SEGMENT / 8 + LANES)

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

/* Scales and zeros of `count` groups from the first on, as floats, and LANES more that are none. */
INLINE void widen_groups(const PackedRow *row, const Packing *p, int64_t first, int64_t count, const bool has_zeros,
                         float *scales, float *zeros) {
    const uint8_t *from = row->scales + first * scale_bytes(p->scale_kind);
    switch (p->scale_kind) { /* a loop each, for the compiler to make vectors of */
    case F32:
        memcpy(scales, from, 4 * count);
        break;
    case BF16:
        for (int64_t i = 0; i < count; i++) {
            scales[i] = widen_scale(from, i, BF16);
        }
        break;
    case F16:
        for (int64_t i = 0; i < count; i++) {
            scales[i] = widen_scale(from, i, F16);
        }
        break;
    case E8M0:
        for (int64_t i = 0; i < count; i++) {
            scales[i] = widen_scale(from, i, E8M0);
        }
        break;
    default:
        for (int64_t i = 0; i < count; i++) {
            scales[i] = widen_scale(from, i, E4M3_SCALE);
        }
    }
    memset(scales + count, 0, 4 * LANES);
    if (has_zeros) {
        for (int64_t i = 0; i < count; i++) {
            zeros[i] = (float)row->zeros[first + i] - 8;
        }
        memset(zeros + count, 0, 4 * LANES);
    }
}

/* R x N dot products over `width` weights, for rows from the first on. */
INLINE void packed_dots(const PackedBlock *block, const int first, const float *const *x, const Packing *p,
                        int64_t width, const int kind, const bool has_groups, const bool has_zeros, const int R,
                        const int N, float (*result)[TOKENS]) {
    vf sums[ROWS][TOKENS], parts_of[ROWS][TOKENS];
    vu full[ROWS];
    for (int r = 0; r < R; r++) {
        full[r] = (vu){0};
        for (int n = 0; n < N; n++) {
            sums[r][n] = (vf){0};
        }
    }
    float scales[has_groups ? ROWS : 1][has_groups ? MOST_GROUPS : 1];
    float zeros[has_zeros ? ROWS : 1][has_zeros ? MOST_GROUPS : 1];
    const int shift = has_groups ? __builtin_ctzll((uint64_t)p->group) : 0;
    vi lane_group = {0};
    for (int i = 0; has_groups && has_nibbles(kind) && i < LANES; i++) {
        lane_group[i] = p->group < BLOCK ? (int32_t)(VECTORS * i >> shift) : 0;
    }
    const int64_t row_bytes = bytes_of(kind, width), block_bytes = bytes_of(kind, BLOCK);
    for (int64_t begin = 0; begin < width; begin += SEGMENT) {
        const int64_t end = least(begin + SEGMENT, width), first_group = begin >> shift;
        for (int r = 0; has_groups && r < R; r++) {
            widen_groups(&block->rows[first + r], p, first_group, ((end - 1) >> shift) + 1 - first_group, has_zeros,
                         scales[r], zeros[has_zeros ? r : 0]);
        }
        for (int64_t k = begin; k < end; k += BLOCK) {
            const int64_t at = bytes_of(kind, k), ahead = at + block->lead, group = (k >> shift) - first_group;
            uint8_t rest[ROWS][BLOCK];
            Block b[ROWS];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const uint8_t *from = block->rows[first + r].weights + at;
                const uint8_t *next = ahead < row_bytes ? block->near[first + r] + ahead
                                                        : block->far[first + r] + (ahead - row_bytes);
                __builtin_prefetch(next, 0, 3);
                if (block_bytes > 64) {
                    __builtin_prefetch(next + 64, 0, 3);
                }
                if (at + block_bytes > row_bytes) {
                    memset(rest[r], 0, block_bytes);
                    memcpy(rest[r], from, row_bytes - at);
                    from = rest[r];
                }
                b[r] = block_at(from, kind);
                if (kind == E4M3) {
                    full[r] |= has_full_e4m3(from);
                }
            }
            vf company[TOKENS]; /* sums of inputs, lane by lane: what a zero is multiplied with */
            if (has_groups) {
                for (int n = 0; n < N; n++) {
                    company[n] = (vf){0};
                    for (int r = 0; r < R; r++) {
                        parts_of[r][n] = (vf){0};
                    }
                }
            }
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; j++) {
                vf inputs[TOKENS];
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) {
                    inputs[n] = *(const vf_at *)(x[n] + k + j * LANES);
                    if (has_zeros) {
                        company[n] += inputs[n];
                    }
                }
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    const vf weights = weights_of(&b[r], kind, j);
#pragma GCC unroll 4
                    for (int n = 0; n < N; n++) {
                        if (has_groups) {
                            parts_of[r][n] += weights * inputs[n];
                        } else {
                            sums[r][n] += weights * inputs[n];
                        }
                    }
                }
            }
#pragma GCC unroll 4
            for (int r = 0; has_groups && r < R; r++) {
                const vf scale = picked(scales[r] + group, lane_group);
                vf zero = {0};
                if (has_zeros) {
                    zero = picked(zeros[r] + group, lane_group);
                }
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) {
                    if (has_zeros) {
                        parts_of[r][n] -= zero * company[n];
                    }
                    sums[r][n] += parts_of[r][n] * scale;
                }
            }
        }
    }
    for (int r = 0; r < R; r++) {
        const bool is_nan = kind == E4M3 && any_full(full[r]);
        for (int n = 0; n < N; n++) {
            const float sum = sum_lanes(sums[r][n]) * (unit_of(kind) * block->rows[first + r].row_scale);
            result[first + r][n] = is_nan ? float_of(0x7fc00000u) : sum;
        }
    }
}

/* As many rows at a time as leave sums and parts of sums in registers. */
#define ROWS_FOR(N) (N == 1 || (N == 2 && LANES == 16) ? ROWS : ROWS / 2)

#define PACKED_DOTS(N, NAME, KIND, GROUPS, ZEROS)                                                                      \
    __attribute__((noinline)) static void NAME##_##N(const PackedBlock *block, const float *const *x,                 \
                                                     const Packing *p, int64_t width, float (*result)[TOKENS]) {      \
        for (int first = 0; first < ROWS; first += ROWS_FOR(N)) {                                                     \
            packed_dots(block, first, x, p, width, KIND, GROUPS, ZEROS, ROWS_FOR(N), N, result);                      \
        }                                                                                                             \
    }
#define PACKED_DOTS_OF(NAME, KIND, GROUPS, ZEROS)                                                                      \
    PACKED_DOTS(1, NAME, KIND, GROUPS, ZEROS)                                                                         \
    PACKED_DOTS(2, NAME, KIND, GROUPS, ZEROS)                                                                         \
    PACKED_DOTS(3, NAME, KIND, GROUPS, ZEROS)                                                                         \
    PACKED_DOTS(4, NAME, KIND, GROUPS, ZEROS)

typedef void (*PackedDots)(const PackedBlock *, const float *const *, const Packing *, int64_t, float (*)[TOKENS]);
PACKED_DOTS_OF(int8_rows, INT8, false, false)
PACKED_DOTS_OF(e4m3_rows, E4M3, false, false)
PACKED_DOTS_OF(e4m3_groups, E4M3, true, false)
PACKED_DOTS_OF(int4_groups, INT4, true, false)
PACKED_DOTS_OF(int4_zeros, INT4, true, true)
PACKED_DOTS_OF(e2m1_groups, E2M1, true, false)

#define ALL_OF(NAME) {NAME##_1, NAME##_2, NAME##_3, NAME##_4}
static const PackedDots INT8_ROWS[] = ALL_OF(int8_rows), E4M3_ROWS[] = ALL_OF(e4m3_rows),
                        E4M3_GROUPS[] = ALL_OF(e4m3_groups), INT4_GROUPS[] = ALL_OF(int4_groups),
                        INT4_ZEROS[] = ALL_OF(int4_zeros), E2M1_GROUPS[] = ALL_OF(e2m1_groups);

/* By the number of pairs less one. */
INLINE const PackedDots *packed_dots_of(const Packing *p) {
    switch (p->kind) {
    case INT8: return INT8_ROWS;
    case E4M3: return p->scale < 0 ? E4M3_ROWS : E4M3_GROUPS;
    case INT4: return p->zero < 0 ? INT4_GROUPS : INT4_ZEROS;
    default: return E2M1_GROUPS;
    }
}
