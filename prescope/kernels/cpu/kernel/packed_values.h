/* Packed weights as floats: whole numbers and floats of 8 and 4 bits, and the scales of their groups.
 *
 * A block is 8 vectors of weights of one row. Weights of 4 bits come out of it in another order: vector j holds elements
 * j, j + 8, j + 16, ..., one of each 32-bit word, so that a shift is all that parts them. */

#define VECTORS 8
#define BLOCK (VECTORS * LANES)
/* Such as need no more than a vector per step: 16 lanes take tables and masks of AVX-512 from BW on, 8 take AVX2. */
#if LANES == 16 && defined(__AVX512BW__)
#define WIDE_STEPS 1
#else
#define WIDE_STEPS 0
#endif
#if LANES == 8 && defined(__AVX2__) && defined(__F16C__)
#define NARROW_STEPS 1
#else
#define NARROW_STEPS 0
#endif

enum { PLAIN = 0, INT8 = 1, E4M3 = 2, INT4 = 3, E2M1 = 4 };      /* weights */
enum { F32 = 0, BF16 = 1, F16 = 2, E8M0 = 3, E4M3_SCALE = 4 };   /* scales */

/* How a matrix of (rows, width) lies in an expert's row. As in native.py, field by field. */
typedef struct {
    int64_t scale, zero, row_scale; /* bytes from the row's start to the scales and zeros (uint8) of groups, and to the
                                       scales (float) of whole rows; -1 for none */
    int64_t group, group_rows;      /* weights of a row, a power of two, and rows, that share a scale */
    int32_t kind, scale_kind;
} Packing;

typedef int32_t vi __attribute__((vector_size(4 * LANES)));

INLINE bool has_nibbles(int kind) { return kind >= INT4; }
INLINE int64_t bytes_of(int kind, int64_t width) {
    return kind == PLAIN ? 2 * width : has_nibbles(kind) ? width / 2 : width;
}

/* Where element k stands in the order in which a kind of weights is unpacked. */
INLINE int64_t place_in_block(int64_t k, int kind) {
    const int64_t r = k % BLOCK;
    return has_nibbles(kind) ? k - r + r % VECTORS * LANES + r / VECTORS : k;
}

/* A float of 8 bits is one of 16 whose exponent has another bias: exact, subnormals too. */
INLINE float widen_e4m3(uint8_t b) {
    if ((b & 0x7f) == 0x7f) {
        return float_of(0x7fc00000u);
    }
    return 0x1p8f * widen_fp16((uint16_t)((b & 0x80) << 8 | (b & 0x7f) << 7));
}

INLINE int64_t scale_bytes(int scale_kind) { return scale_kind == F32 ? 4 : scale_kind == BF16 || scale_kind == F16 ? 2 : 1; }


/* What sums are to be multiplied with: weights are unpacked in units in which that is cheap. */
INLINE float unit_of(int kind) {
    return kind == E4M3 && (WIDE_STEPS || NARROW_STEPS) ? 0x1p8f : kind == E2M1 && !WIDE_STEPS ? 0.5f : 1.0f;
}

/* The bytes of a block, as far as all of its vectors need them alike. */
typedef struct {
    const uint8_t *bytes;
    vu words;
#if NARROW_STEPS
    vu doubles[2]; /* E2M1: twice the values of even and of odd elements, as signed bytes */
#endif
} Block;

static const float E2M1_VALUES[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
static const int8_t E2M1_DOUBLES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

INLINE Block block_at(const uint8_t *p, const int kind) {
    Block b = {.bytes = p};
    if (has_nibbles(kind)) {
        memcpy(&b.words, p, sizeof b.words);
    }
    if (kind == INT4 && !WIDE_STEPS) {
        b.words ^= 0x88888888u; /* q - 8 in two's complement */
    }
#if NARROW_STEPS
    if (kind == E2M1) {
        const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)E2M1_DOUBLES));
        const vu low = b.words & 0x0f0f0f0fu, high = b.words >> 4 & 0x0f0f0f0fu;
        b.doubles[0] = (vu)_mm256_shuffle_epi8(table, (__m256i)low);
        b.doubles[1] = (vu)_mm256_shuffle_epi8(table, (__m256i)high);
    }
#endif
    return b;
}

/* Vector j of a block of INT4 or E2M1. */
INLINE vf nibbles_of(const Block *b, const int kind, const int j) {
#if WIDE_STEPS
    /* A permutation looks at the 4 lowest bits of each word: they need no mask. */
    const __m512 table = kind == E2M1 ? _mm512_loadu_ps(E2M1_VALUES)
                                      : _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    return (vf)_mm512_permutexvar_ps((__m512i)(b->words >> (4 * j)), table);
#else
    if (kind == INT4) {
        return __builtin_convertvector((vi)(b->words << (28 - 4 * j)) >> 28, vf);
    }
#if NARROW_STEPS
    return __builtin_convertvector((vi)(b->doubles[j % 2] << (24 - 8 * (j / 2))) >> 24, vf);
#else
    vf v;
    for (int i = 0; i < LANES; i++) {
        v[i] = E2M1_DOUBLES[b->words[i] >> (4 * j) & 15];
    }
    return v;
#endif
#endif
}

/* Vector j of a block of INT8 or E4M3. Patterns of E4M3 that are no number come out as 480: see `has_nan`. */
INLINE vf bytes_at(const Block *b, const int kind, const int j) {
    const uint8_t *p = b->bytes + j * LANES;
#if WIDE_STEPS
    const __m128i some = _mm_loadu_si128((const __m128i *)p);
    if (kind == INT8) {
        return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(some));
    }
    const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(some), 7);
    return (vf)_mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16((short)0xbf80)));
#elif NARROW_STEPS
    const __m128i some = _mm_loadl_epi64((const __m128i *)p);
    if (kind == INT8) {
        return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(some));
    }
    const __m128i words = _mm_slli_epi16(_mm_cvtepi8_epi16(some), 7);
    return (vf)_mm256_cvtph_ps(_mm_and_si128(words, _mm_set1_epi16((short)0xbf80)));
#else
    vf v;
    for (int i = 0; i < LANES; i++) {
        v[i] = kind == INT8 ? (float)(int8_t)p[i] : widen_e4m3(p[i]);
    }
    return v;
#endif
}

INLINE vf weights_of(const Block *b, const int kind, const int j) {
    return has_nibbles(kind) ? nibbles_of(b, kind, j) : bytes_at(b, kind, j);
}

/* LANES bytes of E4M3 in units of 2^8, as `bytes_at`. */
INLINE vf e4m3_at(const uint8_t *p) {
    const Block b = {.bytes = p};
    return bytes_at(&b, E4M3, 0);
}

typedef uint8_t vb __attribute__((vector_size(LANES)));

INLINE vb bytes_from(const uint8_t *p) {
    vb v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* LANES scales from p on. */
INLINE vf scales_at(const uint8_t *p, int scale_kind) {
    switch (scale_kind) {
    case F32: return *(const vf_at *)p;
    case E4M3_SCALE: return e4m3_at(p) * unit_of(E4M3);
    case F16: return half_at((const uint16_t *)p);
    case BF16: {
        uint16_t some __attribute__((vector_size(2 * LANES)));
        memcpy(&some, p, sizeof some);
        return (vf)(__builtin_convertvector(some, vu) << 16);
    }
    default: { /* E8M0: powers of two, of which the least, 2^-127, is a subnormal */
        const vu exponents = __builtin_convertvector(bytes_from(p), vu) << 23;
        return (vf)(exponents | ((vu)(exponents == 0) & 1u << 22));
    }
    }
}

/* Lane by lane values[index[lane]]. */
INLINE vf picked(vf values, vi index) {
#if WIDE_STEPS
    return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)values);
#elif NARROW_STEPS
    return (vf)_mm256_permutevar8x32_ps((__m256)values, (__m256i)index);
#else
    vf v;
    for (int i = 0; i < LANES; i++) {
        v[i] = values[index[i]];
    }
    return v;
#endif
}

/* Patterns of E4M3 that stand for no number, in a block: they alone carry into the eighth bit. */
INLINE vu has_full_e4m3(const uint8_t *p) {
    vu words[2];
    memcpy(words, p, sizeof words);
    return ((words[0] & 0x7f7f7f7fu) + 0x01010101u) | ((words[1] & 0x7f7f7f7fu) + 0x01010101u);
}

INLINE bool any_full(vu full) {
    uint32_t all = 0;
    for (int i = 0; i < LANES; i++) {
        all |= full[i];
    }
    return all & 0x80808080u;
}
