/* Items that are computed with vectors. */

/* The r-th row of weights of a block: features f.. of `up`, or outputs f.. of `down`; the last again past the end. */
INLINE int64_t row_in_block(const Layer *l, bool is_up, int64_t f, int r) {
    if (!is_up || !l->gated) {
        return least(f + r, (is_up ? l->width : l->out_dim) - 1);
    }
    const int64_t feature = least(f + r % 2, l->width - 1);
    return l->interleaved ? 2 * feature + r / 2 : feature + r / 2 * l->width;
}

static void block_rows(const Job *job, int64_t e, bool is_up, int64_t f, const uint16_t **w) {
    const Layer *l = &job->layer;
    const uint16_t *base = (const uint16_t *)(row_of(job, e) + (is_up ? l->up : l->down));
    const int64_t stride = is_up ? l->in_dim : l->width;
    for (int r = 0; r < ROWS; r++) {
        w[r] = base + row_in_block(l, is_up, f, r) * stride;
    }
}

/* What becomes of a block's sums for pairs pair .. pair + n, of which features or outputs f .. end are wanted. */
static void keep_block(const Job *job, Part p, int64_t f, int64_t pair, int n, float (*sums)[TOKENS]) {
    const int64_t step = p.is_up && job->layer.gated ? ROWS / 2 : ROWS;
    for (int i = 0; i < n; i++) {
        for (int r = 0; r < least(step, p.end - f); r++) {
            if (!p.is_up) {
                keep_out(job, p.e, pair + i, f + r, sums[r][i]);
            } else {
                keep_act(job, p.e, pair + i, f + r, sums[r][i], sums[(r + ROWS / 2) % ROWS][i]);
            }
        }
    }
}

static void rows_part(const Job *job, Part p, int64_t following) {
    const Layer *l = &job->layer;
    const bool pairs_of_rows = p.is_up && l->gated;
    const int64_t step = pairs_of_rows ? ROWS / 2 : ROWS, width = p.is_up ? l->in_dim : l->width;
    const int64_t begin = job->first[p.e], end = job->first[p.e + 1];
    const uint16_t *w[ROWS], *ahead[ROWS];
    block_rows(job, p.e, p.is_up, p.begin, ahead);
    for (int64_t f = p.begin; f < p.end; f += step) {
        memcpy(w, ahead, sizeof w);
        if (f + step < p.end) {
            block_rows(job, p.e, p.is_up, f + step, ahead);
        } else if (following >= job->first_up) {
            const Part q = part_of(job, following);
            block_rows(job, q.e, q.is_up, q.begin, ahead);
        }
        for (int64_t pair = begin; pair < end; pair += COMPANIONS) {
            const int n = (int)least(COMPANIONS, end - pair);
            const float *x[TOKENS];
            for (int i = 0; i < n; i++) {
                x[i] = input_of(job, p.is_up, pair + i);
            }
            float sums[ROWS][TOKENS];
            DOTS_OF[l->half][n - 1](w, pair == begin ? ahead : w, x, width, sums);
            keep_block(job, p, f, pair, n, sums);
        }
    }
}

/* Column windows of a part of transposed weights, in the order gates, values; counts are what is left of each. */
static void windows(const Job *job, Part p, int64_t *columns, int64_t *counts) {
    const Layer *l = &job->layer;
    const bool halves = p.is_up && l->gated && !l->interleaved;
    const int64_t scale = p.is_up && l->gated && l->interleaved ? 2 : 1;
    for (int j = 0; j < WINDOWS; j++) {
        const int64_t within = (halves ? j % (WINDOWS / 2) : j) * CHUNK;
        columns[j] = scale * p.begin + within + (halves && j >= WINDOWS / 2 ? l->width : 0);
        counts[j] = scale * (p.end - p.begin) - within;
        if (counts[j] <= 0) { /* nothing of it is wanted: any address that may be read */
            columns[j] = scale * p.begin;
        }
    }
}

static void keep_columns(const Job *job, Part p, int64_t pair, const vf (*sums)[2]) {
    const Layer *l = &job->layer;
    float flat[WINDOWS * CHUNK];
    for (int c = 0; c < WINDOWS * CHUNK; c++) {
        const int64_t at = unpacked(c % CHUNK, l->half);
        flat[c] = sums[c / CHUNK][at / LANES][at % LANES];
    }
    for (int64_t f = p.begin; f < p.end; f++) {
        const int64_t i = f - p.begin;
        if (!p.is_up) {
            keep_out(job, p.e, pair, f, flat[i]);
        } else if (!l->gated) {
            keep_act(job, p.e, pair, f, flat[i], 0);
        } else if (l->interleaved) {
            keep_act(job, p.e, pair, f, flat[2 * i], flat[2 * i + 1]);
        } else {
            keep_act(job, p.e, pair, f, flat[i], flat[i + WINDOWS / 2 * CHUNK]);
        }
    }
}

static void columns_part(const Job *job, Part p) {
    const Layer *l = &job->layer;
    const uint16_t *base = (const uint16_t *)(row_of(job, p.e) + (p.is_up ? l->up : l->down));
    const int64_t depth = p.is_up ? l->in_dim : l->width;
    const int64_t stride = p.is_up ? (l->gated ? 2 : 1) * l->width : l->out_dim;
    int64_t columns[WINDOWS], counts[WINDOWS];
    windows(job, p, columns, counts);
    bool whole = true;
    for (int j = 0; j < WINDOWS; j++) {
        whole &= counts[j] >= CHUNK;
    }
    const int64_t end = job->first[p.e + 1];
    for (int64_t begin = job->first[p.e]; begin < end; begin += COMPANY) {
        const int count = (int)least(COMPANY, end - begin);
        vf sums[COMPANY][WINDOWS][2];
        memset(sums, 0, sizeof sums[0] * count);
        for (int64_t k = 0; k < depth; k += DEPTH) {
            const int64_t rows = least(DEPTH, depth - k);
            for (int i = 0; i < count; i += 2) {
                const int n = (int)least(2, count - i);
                const float *x[2];
                vf(*to[2])[2];
                for (int j = 0; j < n; j++) {
                    x[j] = input_of(job, p.is_up, begin + i + j) + k;
                    to[j] = sums[i + j];
                }
                SCALED_OF[l->half][n - 1](base + k * stride, stride, columns, counts, whole, rows, x, to);
            }
        }
        for (int i = 0; i < count; i++) {
            keep_columns(job, p, begin + i, (const vf(*)[2])sums[i]);
        }
    }
}

static void prepare(const Job *job, int64_t token) {
    const Layer *l = &job->layer;
    const uint16_t *x = job->lot.x + job->distinct[token] * job->lot.x_stride;
    float *to = job->inputs + token * job->in_pad;
    int64_t k = 0;
    if (is_direct(l)) {
        memcpy(to, x, 2 * l->in_dim);
        memset((uint16_t *)to + l->in_dim, 0, 2 * (job->in_pad - l->in_dim));
        return;
    }
    if (is_packed(l) || l->transposed) {
        for (; k < l->in_dim; k++) {
            to[place_of(l, true, k)] = widen(x[k], l->half);
        }
        for (; k < job->in_pad && !l->transposed; k++) {
            to[place_of(l, true, k)] = 0;
        }
        return;
    }
    for (; k + CHUNK <= l->in_dim; k += CHUNK) {
        vf first, second;
        unpack(x + k, l->half, &first, &second);
        *(vf_at *)(to + k) = first;
        *(vf_at *)(to + k + LANES) = second;
    }
    for (; k < job->in_pad; k++) {
        to[unpacked(k, l->half)] = k < l->in_dim ? widen(x[k], l->half) : 0;
    }
}

/* What weights of zero are multiplied with at the end of a row must be finite. */
static void clear_pad(const Job *job, Part p) {
    const Layer *l = &job->layer;
    for (int64_t pair = job->first[p.e]; pair < job->first[p.e + 1]; pair++) {
        for (int64_t f = l->width; f < job->width_pad; f++) {
            float *row = job->acts + pair * job->width_pad;
            if (is_direct(l)) {
                ((uint16_t *)row)[f] = 0;
            } else {
                row[place_of(l, false, f)] = 0;
            }
        }
    }
}
