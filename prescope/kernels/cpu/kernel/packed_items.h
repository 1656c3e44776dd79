/* Items of packed weights. */

/* Row number `index` of one of an expert's matrices. */
static PackedRow packed_row(const Job *job, int64_t e, bool is_up, int64_t index) {
    const Layer *l = &job->layer;
    const Packing *p = is_up ? &l->up_packing : &l->down_packing;
    const uint8_t *row = row_of(job, e);
    const int64_t width = is_up ? l->in_dim : l->width;
    PackedRow found = {.weights = row + (is_up ? l->up : l->down) + index * bytes_of(p->kind, width), .row_scale = 1};
    if (p->scale >= 0) {
        const int64_t groups = (width - 1) / p->group + 1;
        found.scales = row + p->scale + index / p->group_rows * groups * scale_bytes(p->scale_kind);
        found.zeros = row + p->zero + index * groups; /* not looked at without zeros */
    }
    if (p->row_scale >= 0) {
        memcpy(&found.row_scale, row + p->row_scale + 4 * index, 4);
    }
    return found;
}

/* Where the bytes to fetch next begin: rows of the block at f, which behind the part's end is in the one that follows.
 * Their scales are fetched here. */
static void fetch_rows(const Job *job, Part p, const Part *following, int64_t f, const uint8_t **w) {
    const bool is_within = f < p.end || !following;
    const Part from = is_within ? p : *following;
    const int64_t at = least(is_within ? f : from.begin + (f - p.end), from.end - 1);
    const Layer *l = &job->layer;
    const Packing *packing = from.is_up ? &l->up_packing : &l->down_packing;
    const int64_t width = from.is_up ? l->in_dim : l->width;
    const bool own_scales = packing->scale >= 0 && packing->group_rows == 1;
    const int64_t bytes = own_scales ? ((width - 1) / packing->group + 1) * scale_bytes(packing->scale_kind) : 0;
    for (int r = 0; r < ROWS; r++) {
        const PackedRow row = packed_row(job, from.e, from.is_up, row_in_block(l, from.is_up, at, r));
        w[r] = row.weights;
        for (int64_t i = 0; i < bytes; i += 64) {
            __builtin_prefetch(row.scales + i, 0, 3);
        }
    }
}

static void packed_part(const Job *job, Part p, int64_t following) {
    const Layer *l = &job->layer;
    const Packing *packing = p.is_up ? &l->up_packing : &l->down_packing;
    const PackedDots *dots = packed_dots_of(packing);
    const int64_t step = p.is_up && l->gated ? ROWS / 2 : ROWS, width = p.is_up ? l->in_dim : l->width;
    const int64_t begin = job->first[p.e], end = job->first[p.e + 1];
    const int64_t row_bytes = bytes_of(packing->kind, width);
    /* Rows are often shorter than what must be under way: then whole blocks are skipped. */
    const int64_t blocks = parts(AHEAD_BYTES, row_bytes);
    const Part next = following >= job->first_up ? part_of(job, following) : p;
    PackedBlock block = {.lead = least(row_bytes, AHEAD_BYTES)};
    for (int64_t f = p.begin; f < p.end; f += step) {
        for (int r = 0; r < ROWS; r++) {
            block.rows[r] = packed_row(job, p.e, p.is_up, row_in_block(l, p.is_up, f, r));
            block.near[r] = block.rows[r].weights;
        }
        fetch_rows(job, p, following >= job->first_up ? &next : NULL, f + blocks * step, block.far);
        for (int64_t pair = begin; pair < end; pair += COMPANIONS) {
            const int n = (int)least(COMPANIONS, end - pair);
            const float *x[TOKENS];
            for (int i = 0; i < n; i++) {
                x[i] = input_of(job, p.is_up, pair + i);
            }
            float sums[ROWS][TOKENS];
            dots[n - 1](&block, x, packing, width, sums);
            keep_block(job, p, f, pair, n, sums);
            memcpy(block.far, block.near, sizeof block.far); /* for other pairs there is nothing left to fetch */
        }
    }
}
