/* Items that are computed with tiles. */

#if HAS_TILES
static Rows tile_rows(const Job *job, Part p, int64_t f) {
    const Layer *l = &job->layer;
    const uint16_t *base = (const uint16_t *)(row_of(job, p.e) + (p.is_up ? l->up : l->down));
    const int64_t row = p.is_up ? l->in_dim : l->width;
    Rows w = {.stride = 2 * row};
    if (!p.is_up || !l->gated) {
        w.block[0] = base + f * row;
        w.block[1] = w.block[0] + TILE * row;
    } else if (l->interleaved) {
        w.block[0] = base + 2 * f * row;
        w.block[1] = w.block[0] + row;
        w.stride *= 2;
    } else {
        w.block[0] = base + f * row;
        w.block[1] = w.block[0] + l->width * row;
    }
    return w;
}

/* One pair's column of a tile of sums, rounded, with its bias. */
INLINE void finish_column(const Job *job, int64_t e, int64_t bias, int64_t index, int64_t step,
                          float (*sums)[TILE], int column, uint16_t *y) {
    for (int r = 0; r < TILE; r++) {
        y[r] = round_bf16(sums[r][column]);
    }
    if (bias >= 0) {
        const uint16_t *b = (const uint16_t *)(row_of(job, e) + bias) + index;
        for (int r = 0; r < TILE; r++) {
            y[r] = round_bf16(widen(y[r], false) + widen(b[r * step], false));
        }
    }
}

static void keep_out_column(const Job *job, int64_t e, int64_t pair, int64_t d, float (*sums)[TILE], int column) {
    uint16_t y[TILE];
    finish_column(job, e, job->layer.down_bias, d, 1, sums, column, y);
    memcpy(job->lot.out + job->places[pair] * job->lot.out_stride + d, y, sizeof y);
}

/* TILE features with a gate, else twice as many. */
static void keep_act_column(const Job *job, int64_t e, int64_t pair, int64_t f, float (*one)[TILE], float (*two)[TILE],
                            int column) {
    const Layer *l = &job->layer;
    const int64_t i = pair - job->first[e], step = l->gated && l->interleaved ? 2 : 1;
    uint16_t *group = job->packed_acts + (job->plans[e].first_group + i / TILE) * TILE * l->width;
    uint16_t a[TILE], b[TILE];
    finish_column(job, e, l->up_bias, step * f, step, one, column, a);
    const int64_t second = !l->gated ? f + TILE : l->interleaved ? 2 * f + 1 : l->width + f;
    finish_column(job, e, l->up_bias, second, step, two, column, b);
    for (int r = 0; r < TILE; r++) {
        if (l->gated) {
            group[in_group(f + r, i % TILE)] = round_bf16(l->gate[a[r]] * l->value[b[r]]);
        } else {
            group[in_group(f + r, i % TILE)] = (uint16_t)(bits_of(l->gate[a[r]]) >> 16);
            group[in_group(f + TILE + r, i % TILE)] = (uint16_t)(bits_of(l->gate[b[r]]) >> 16);
        }
    }
}

static void tiles_part(const Job *job, Part p, int64_t following) {
    const Layer *l = &job->layer;
    const Plan *plan = &job->plans[p.e];
    const int64_t width = p.is_up ? l->in_dim : l->width;
    const uint16_t *from = (p.is_up ? job->packed_inputs : job->packed_acts) + plan->first_group * TILE * width;
    const int64_t step = p.is_up && l->gated ? TILE : 2 * TILE;
    const int64_t begin = job->first[p.e], end = job->first[p.e + 1];
    Rows ahead = tile_rows(job, p, p.begin);
    tiles_begin();
    for (int64_t f = p.begin; f < p.end; f += step) {
        const Rows w = ahead;
        if (f + step < p.end) {
            ahead = tile_rows(job, p, f + step);
        } else if (following >= job->first_up) {
            const Part q = part_of(job, following);
            ahead = tile_rows(job, q, q.begin); /* perhaps of an expert without tiles: its first rows all the same */
        }
        for (int64_t group = 0; group < plan->packs; group += 2) {
            const int groups = (int)least(2, plan->packs - group);
            const uint16_t *packed[2] = {from + group * TILE * width, from + (group + 1) * TILE * width};
            float sums[2][2][TILE][TILE];
            tiles(w, ahead, group == 0, packed, groups, width, sums);
            const int64_t first = begin + group * TILE, count = least(2 * TILE, end - first);
            for (int64_t i = 0; i < count; i++) {
                const int column = i % TILE;
                if (p.is_up) {
                    keep_act_column(job, p.e, first + i, f, sums[0][i / TILE], sums[1][i / TILE], column);
                } else {
                    keep_out_column(job, p.e, first + i, f, sums[0][i / TILE], column);
                    keep_out_column(job, p.e, first + i, f + TILE, sums[1][i / TILE], column);
                }
            }
        }
    }
    tiles_end();
}

/* x of one group of pairs; columns past the last pair are zero, of the activations to come too. */
static void pack(const Job *job, int64_t index) {
    const Layer *l = &job->layer;
    const int64_t e = job->group_of[index];
    const int64_t begin = job->first[e] + (index - job->plans[e].first_group) * TILE;
    const int64_t count = least(TILE, job->first[e + 1] - begin);
    uint32_t *to = (uint32_t *)(job->packed_inputs + index * TILE * l->in_dim);
    const uint16_t *x[TILE];
    for (int64_t i = 0; i < count; i++) {
        x[i] = job->lot.x + job->tokens[begin + i] * job->lot.x_stride;
    }
    for (int64_t k = 0; k < l->in_dim / 2; k++) {
        for (int64_t i = 0; i < count; i++) {
            memcpy(to + k * TILE + i, x[i] + 2 * k, 4);
        }
        for (int64_t i = count; i < TILE; i++) {
            to[k * TILE + i] = 0;
        }
    }
    if (count < TILE) {
        memset(job->packed_acts + index * TILE * l->width, 0, 2 * TILE * l->width);
    }
}
#endif
