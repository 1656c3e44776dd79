/* Weights stored (in, out): sums of their scaled rows, some columns at a time. */

#define WINDOWS 4  /* column windows of CHUNK at a time */
#define DEPTH 64   /* rows at a time: 16 KiB stay in the L1 while all pairs use them */
#define COMPANY 32 /* pairs that share one pass over the weights */

INLINE void unpack_some(const uint16_t *p, int64_t count, bool half, vf *first, vf *second) {
    if (count >= CHUNK) {
        unpack(p, half, first, second);
        return;
    }
    uint16_t some[CHUNK] = {0};
    memcpy(some, p, 2 * most(count, 0));
    unpack(some, half, first, second);
}

/* sums (WINDOWS, 2 vectors) += x[k] * w[k, window] over `depth` rows k, for N pairs. */
INLINE void scaled(const uint16_t *w, int64_t stride, const int64_t *columns, const int64_t *counts, bool whole,
                   int64_t depth, const float *const *x, vf (*const *sums)[2], const int N, const bool half) {
    vf local[2][WINDOWS][2];
    for (int n = 0; n < N; n++) {
        memcpy(local[n], sums[n], sizeof local[n]);
    }
    for (int64_t k = 0; k < depth; k++) {
#pragma GCC unroll 4
        for (int j = 0; j < WINDOWS; j++) {
            const uint16_t *p = w + k * stride + columns[j];
            __builtin_prefetch(p + 16 * stride, 0, 3);
            vf first, second;
            if (whole) {
                unpack(p, half, &first, &second);
            } else {
                unpack_some(p, counts[j], half, &first, &second);
            }
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) {
                local[n][j][0] += x[n][k] * first;
                local[n][j][1] += x[n][k] * second;
            }
        }
    }
    for (int n = 0; n < N; n++) {
        memcpy(sums[n], local[n], sizeof local[n]);
    }
}

#define SCALED(N, TYPE, HALF)                                                                                          \
    __attribute__((noinline)) static void scaled_##N##_##TYPE(                                                        \
        const uint16_t *w, int64_t stride, const int64_t *columns, const int64_t *counts, bool whole, int64_t depth,  \
        const float *const *x, vf (*const *sums)[2]) {                                                                \
        if (whole) {                                                                                                  \
            scaled(w, stride, columns, counts, true, depth, x, sums, N, HALF);                                        \
        } else {                                                                                                      \
            scaled(w, stride, columns, counts, false, depth, x, sums, N, HALF);                                       \
        }                                                                                                             \
    }
SCALED(1, bf16, false)
SCALED(2, bf16, false)
SCALED(1, fp16, true)
SCALED(2, fp16, true)

typedef void (*Scaled)(const uint16_t *, int64_t, const int64_t *, const int64_t *, bool, int64_t, const float *const *,
                       vf (*const *)[2]);
static const Scaled SCALED_OF[2][2] = {{scaled_1_bf16, scaled_2_bf16}, {scaled_1_fp16, scaled_2_fp16}};
