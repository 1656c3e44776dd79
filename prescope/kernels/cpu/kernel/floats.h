/* Vectors, and 16-bit floats in them. */

/* The widest vectors that may be used: 16 floats, or 8 or 4, so that a machine with AVX-512 can test the others too. */
#ifndef MOST_LANES
#define MOST_LANES 16
#endif
#if defined(__AVX512F__) && MOST_LANES >= 16
#define LANES 16
#elif defined(__AVX__) && MOST_LANES >= 8
#define LANES 8
#else
#define LANES 4
#endif
#define CHUNK (2 * LANES) /* 16-bit weights of one load */
/* Whether the CPU multiplies pairs of bfloat16 itself: inputs then stay as they are. On AMD twice the rate. */
#if defined(__AVX512BF16__) && LANES == 16
#define HAS_PRODUCTS 1
#else
#define HAS_PRODUCTS 0
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef float vf_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu_at __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

INLINE uint32_t bits_of(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    return u;
}

INLINE float float_of(uint32_t u) {
    float v;
    memcpy(&v, &u, 4);
    return v;
}

INLINE uint16_t round_bf16(float v) {
    uint32_t u = bits_of(v);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    return (uint16_t)(v != v ? 0x7fc0 : rounded); /* NaN must not be rounded up to infinity */
}

INLINE float widen_fp16(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) {
        return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    }
    /* exponent and mantissa in place, times 2^112 to move the bias; exact for subnormals too */
    return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
#endif
}

INLINE uint16_t round_fp16(float v) {
#if defined(__F16C__)
    return (uint16_t)_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t u = bits_of(v), sign = u >> 16 & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u);
    }
    if (u >= 0x477ff000u) {
        return (uint16_t)(sign | 0x7c00u);
    }
    if (u < 0x38800000u) { /* subnormal: adding 0.5 leaves the rounded bits at the end of the mantissa */
        return (uint16_t)(sign | (bits_of(float_of(u) + 0.5f) - 0x3f000000u));
    }
    return (uint16_t)(sign | (u - 0x38000000u + 0xfffu + (u >> 13 & 1)) >> 13);
#endif
}

INLINE float widen(uint16_t b, bool half) { return half ? widen_fp16(b) : float_of((uint32_t)b << 16); }
INLINE uint16_t round_to(float v, bool half) { return half ? round_fp16(v) : round_bf16(v); }

/* LANES numbers of float16. */
INLINE vf half_at(const uint16_t *p) {
#if LANES == 16 && defined(__x86_64__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif LANES == 8 && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vf v;
    for (int i = 0; i < LANES; i++) {
        v[i] = widen_fp16(p[i]);
    }
    return v;
#endif
}

/* CHUNK weights as two vectors of floats. bfloat16 is the upper half of a float: even elements are shifted up, odd ones
 * masked, without a permutation. So `first` holds elements 0, 2, 4, ... there, and 0, 1, 2, ... for float16. */
INLINE void unpack(const uint16_t *p, bool half, vf *first, vf *second) {
    if (!half) {
        vu u = *(const vu_at *)p;
        *first = (vf)(u << 16);
        *second = (vf)(u & 0xffff0000u);
        return;
    }
    *first = half_at(p);
    *second = half_at(p + LANES);
}

/* Where element k stands in the order that `unpack` gives. */
INLINE int64_t unpacked(int64_t k, bool half) {
    int64_t r = k % CHUNK;
    return half ? k : k - r + (r & 1) * LANES + (r >> 1);
}

INLINE float sum_lanes(vf v) {
    float s[LANES];
    memcpy(s, &v, sizeof s);
    for (int n = LANES / 2; n; n /= 2) {
        for (int i = 0; i < n; i++) {
            s[i] += s[i + n];
        }
    }
    return s[0];
}
