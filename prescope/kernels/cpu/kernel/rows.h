/* Weights stored (out, in): dot products with their rows. */

/* How far ahead of its use each of the rows at hand is fetched: hardware prefetchers stop at every 4 KiB. */
#ifndef AHEAD_BYTES
#define AHEAD_BYTES 2048
#endif

#define ROWS 4   /* weight rows at a time: 4 x 4 sums fill the registers of AVX-512 */
#define TOKENS 4 /* most pairs at a time, */
#define COMPANIONS (LANES == 16 ? 4 : 2) /* and as many as leave no sum without a register */

/* sums[n] += w * inputs[n][k...] over a chunk. */
INLINE void add_products(const uint16_t *w, int64_t k, const bool half, const int N, const float *const *inputs,
                         vf *sums) {
#if HAS_PRODUCTS
    if (!half) {
        const __m512bh weights = (__m512bh)_mm512_loadu_si512(w);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            const uint16_t *input = (const uint16_t *)inputs[n] + k;
            sums[n] = (vf)_mm512_dpbf16_ps((__m512)sums[n], weights, (__m512bh)_mm512_loadu_si512(input));
        }
        return;
    }
#endif
    vf first, second;
    unpack(w, half, &first, &second);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        sums[n] += first * *(const vf_at *)(inputs[n] + k);
        sums[n] += second * *(const vf_at *)(inputs[n] + k + LANES);
    }
}

/* ROWS x N dot products over `width` elements. While the rows are read, what follows is fetched: each row's own bytes
 * AHEAD_BYTES further on, and at its end the beginning of `ahead`. */
INLINE void dots(const uint16_t *const *w, const uint16_t *const *ahead, const float *const *x, int64_t width,
                 const int N, const bool half, float (*result)[TOKENS]) {
    vf sums[ROWS][TOKENS];
    for (int r = 0; r < ROWS; r++) {
        for (int n = 0; n < N; n++) {
            sums[r][n] = (vf){0};
        }
    }
    const int64_t end = width - width % CHUNK;
    const int64_t lead = least(end, AHEAD_BYTES / 2);
    for (int64_t k = 0; k < end; k += CHUNK) {
        const int64_t at = k + lead;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            __builtin_prefetch(at < end ? w[r] + at : ahead[r] + (at - end), 0, 3);
            add_products(w[r] + k, k, half, N, x, sums[r]);
        }
    }
    if (end < width) {
        for (int r = 0; r < ROWS; r++) {
            uint16_t rest[CHUNK] = {0};
            memcpy(rest, w[r] + end, 2 * (width - end));
            add_products(rest, end, half, N, x, sums[r]);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int n = 0; n < N; n++) {
            result[r][n] = sum_lanes(sums[r][n]);
        }
    }
}

#define DOTS(N, TYPE, HALF)                                                                                            \
    __attribute__((noinline)) static void dots_##N##_##TYPE(const uint16_t *const *w, const uint16_t *const *ahead,   \
                                                           const float *const *x, int64_t width,                      \
                                                           float (*result)[TOKENS]) {                                 \
        dots(w, ahead, x, width, N, HALF, result);                                                                    \
    }
DOTS(1, bf16, false)
DOTS(2, bf16, false)
DOTS(3, bf16, false)
DOTS(4, bf16, false)
DOTS(1, fp16, true)
DOTS(2, fp16, true)
DOTS(3, fp16, true)
DOTS(4, fp16, true)

typedef void (*Dots)(const uint16_t *const *, const uint16_t *const *, const float *const *, int64_t,
                     float (*)[TOKENS]);
static const Dots DOTS_OF[2][TOKENS] = {
    {dots_1_bf16, dots_2_bf16, dots_3_bf16, dots_4_bf16},
    {dots_1_fp16, dots_2_fp16, dots_3_fp16, dots_4_fp16},
};
