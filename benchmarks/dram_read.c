/* Read memory and do as little else as possible: what CPU threads can get out of DRAM. One call is one thread's share. */
#include <stdint.h>

typedef uint64_t vector __attribute__((vector_size(64), aligned(64)));

/* Sum over `bytes` (a multiple of 1024) as `streams` (1 or 4) runs side by side, fetching `ahead` bytes in advance. */
uint64_t read_sum(const uint8_t *data, int64_t bytes, int streams, int64_t ahead) {
    vector sums[4] = {{0}};
    const int64_t share = bytes / streams;
    for (int64_t at = 0; at < share; at += 256) {
        for (int s = 0; s < streams; s++) {
            const uint8_t *p = data + s * share + at;
            for (int line = 0; line < 4; line++) {
                if (ahead) {
                    __builtin_prefetch(p + 64 * line + ahead, 0, 3);
                }
                sums[line] += *(const vector *)(p + 64 * line);
            }
        }
    }
    vector sum = sums[0] + sums[1] + sums[2] + sums[3];
    uint64_t all = 0;
    for (int i = 0; i < 8; i++) {
        all += sum[i];
    }
    return all;
}
