/* Weights stored (out, in): products of tiles, by AMX. */

/* Pairs of an expert from which tiles of AMX are used, where there are any: a tile of 16 pairs takes the time of a few.
 */
#ifndef TILE_PAIRS
#define TILE_PAIRS 6
#endif
#define TILE 16       /* weight rows, and pairs, of a tile */
#define TILE_DEPTH 32 /* inner elements of a tile */
#if defined(__AMX_BF16__) || defined(AMX_EMULATED)
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

#if HAS_TILES
#if defined(AMX_EMULATED) /* so that tests on other machines run what is around the tiles */
static _Thread_local union {
    uint16_t pairs[TILE][2 * TILE];
    float sums[TILE][TILE];
} tile_memory[8];
#define tile_zero(t) memset(&tile_memory[t], 0, sizeof tile_memory[t])
#define tile_load(t, p, stride)                                                                                        \
    for (int r_ = 0; r_ < TILE; r_++) memcpy(tile_memory[t].pairs[r_], (const uint8_t *)(p) + r_ * (stride), 64)
#define tile_store(t, p) memcpy(p, &tile_memory[t], sizeof tile_memory[t])
static void tile_product(int c, int a, int b) {
    for (int m = 0; m < TILE; m++) {
        for (int k = 0; k < TILE_DEPTH; k++) {
            const float w = float_of((uint32_t)tile_memory[a].pairs[m][k] << 16);
            for (int n = 0; n < TILE; n++) {
                tile_memory[c].sums[m][n] += w * float_of((uint32_t)tile_memory[b].pairs[k / 2][2 * n + k % 2] << 16);
            }
        }
    }
}
static void tiles_begin(void) {}
static void tiles_end(void) {}
static bool may_use_tiles(void) { return true; }
#else
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, p, stride) _tile_loadd(t, p, stride)
#define tile_store(t, p) _tile_stored(t, p, 4 * TILE)
#define tile_product(c, a, b) _tile_dpbf16ps(c, a, b)
static void tiles_begin(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((packed, aligned(64))) config = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.bytes[t] = 64;
        config.rows[t] = TILE;
    }
    _tile_loadconfig(&config);
}
static void tiles_end(void) { _tile_release(); } /* else every switch of threads saves 8 KiB */
static bool may_use_tiles(void) {
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
}
#endif

/* Two blocks of TILE weight rows. */
typedef struct {
    const uint16_t *block[2];
    int64_t stride; /* bytes from row to row */
} Rows;

/* sums[block][group] (TILE rows, TILE pairs) over `width` elements of weights; packed pairs of one group or two. */
static void tiles(Rows w, Rows ahead, bool fetch, const uint16_t *const *packed, int groups, int64_t width,
                  float (*sums)[2][TILE][TILE]) {
    const int64_t lead = least(width, AHEAD_BYTES / 4 / TILE_DEPTH * TILE_DEPTH);
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (int64_t k = 0; k < width; k += TILE_DEPTH) {
        if (fetch) {
            const int64_t at = k + lead;
            const Rows *from = at < width ? &w : &ahead;
            const int64_t offset = 2 * (at < width ? at : at - width);
            for (int r = 0; r < TILE; r++) {
                __builtin_prefetch((const uint8_t *)from->block[0] + r * from->stride + offset, 0, 3);
                __builtin_prefetch((const uint8_t *)from->block[1] + r * from->stride + offset, 0, 3);
            }
        }
        tile_load(4, w.block[0] + k, w.stride);
        tile_load(5, w.block[1] + k, w.stride);
        tile_load(6, packed[0] + k * TILE, 64);
        tile_product(0, 4, 6);
        tile_product(2, 5, 6);
        if (groups > 1) {
            tile_load(7, packed[1] + k * TILE, 64);
            tile_product(1, 4, 7);
            tile_product(3, 5, 7);
        }
    }
    tile_store(0, sums[0][0]);
    tile_store(1, sums[0][1]);
    tile_store(2, sums[1][0]);
    tile_store(3, sums[1][1]);
}
#else
static bool may_use_tiles(void) { return false; }
#endif

/* Where element k of pair number `column` stands in a packed group. */
INLINE int64_t in_group(int64_t k, int64_t column) {
    return k / TILE_DEPTH * (TILE * TILE_DEPTH) + (k % TILE_DEPTH / 2 * TILE + column) * 2 + k % 2;
}
