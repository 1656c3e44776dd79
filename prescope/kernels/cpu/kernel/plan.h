/* A submission becomes items. */

/* Bytes of weights of an item: at most MOST, since large ones are read faster (8 experts of Qwen3, 14 threads: 96, 93
 * and 122 GB/s with 32, 64 and 128 KiB), and fewer where a thread would get less than SHARES items of a kind, since all
 * must end together. */
#ifndef MOST_ITEM_BYTES
#define MOST_ITEM_BYTES (128 << 10)
#endif
#ifndef SHARES
#define SHARES 6
#endif
#define LEAST_ITEM_BYTES (16 << 10)

static void *grown(void *memory, int64_t *room, int64_t bytes) {
    if (memory && bytes <= *room) {
        return memory;
    }
    free(memory);
    *room = bytes + bytes / 2 + 256;
    if (posix_memalign(&memory, 64, *room) != 0) {
        *room = 0;
        return NULL;
    }
    return memory;
}

/* Blocks of an item, of `count` blocks in all. What an item computes does not depend on how many there are in it. */
static int64_t blocks_of(int64_t block_bytes, int64_t count, const Pool *pool) {
    const int64_t share = block_bytes * count / (SHARES * pool->num_threads);
    return most(1, least(MOST_ITEM_BYTES, most(LEAST_ITEM_BYTES, share)) / block_bytes);
}

/* Tiles or vectors for each expert, and the items of each. */
static void plan_items(Job *job, const Pool *pool) {
    const Layer *l = &job->layer;
    const int64_t n = job->lot.num_experts, up_rows = l->gated ? 2 : 1;
    const bool fits = pool->tiles && !is_packed(l) && !l->transposed && !l->half && l->in_dim % TILE_DEPTH == 0 &&
                      l->width % TILE_DEPTH == 0 && l->out_dim % (2 * TILE) == 0;
    job->num_groups = 0;
    for (int64_t e = 0; e < n; e++) {
        Plan *plan = &job->plans[e];
        const int64_t pairs = job->first[e + 1] - job->first[e];
        plan->packs = fits && pairs >= TILE_PAIRS ? parts(pairs, TILE) : 0;
        plan->first_group = job->num_groups;
        job->num_groups += plan->packs;
        if (l->transposed) {
            plan->down_step = WINDOWS * CHUNK;
            plan->up_step = plan->down_step / up_rows;
            continue;
        }
        const int64_t up_block = (plan->packs ? 2 * TILE : ROWS) / up_rows;
        const int64_t down_block = plan->packs ? 2 * TILE : ROWS;
        const int64_t up_bytes = bytes_of(l->up_packing.kind, up_rows * l->in_dim);
        const int64_t down_bytes = bytes_of(l->down_packing.kind, l->width);
        plan->up_step = blocks_of(up_bytes * up_block, n * l->width / up_block, pool) * up_block;
        plan->down_step = blocks_of(down_bytes * down_block, n * l->out_dim / down_block, pool) * down_block;
    }
}

static void number_items(Job *job) {
    const int64_t n = job->lot.num_experts;
    job->first_up = job->total = job->num_distinct + job->num_groups;
    for (int64_t e = 0; e < n; e++) {
        Plan *plan = &job->plans[e];
        const int64_t ups = parts(job->layer.width, plan->up_step);
        plan->up_item = job->total;
        job->total += ups;
        atomic_store_explicit(&plan->ups_left, ups, memory_order_relaxed);
        atomic_store_explicit(&plan->packs_left, plan->packs, memory_order_relaxed);
        for (int64_t i = 0; i < plan->packs; i++) {
            job->group_of[plan->first_group + i] = e;
        }
    }
    job->first_down = job->total;
    for (int64_t e = 0; e < n; e++) {
        job->plans[e].down_item = job->total;
        job->total += parts(job->layer.out_dim, job->plans[e].down_step);
    }
}

/* The tokens of experts without tiles, each once. */
static void find_distinct(Job *job, int64_t *slot_of) {
    memset(slot_of, -1, 8 * job->lot.num_tokens);
    job->num_distinct = 0;
    for (int64_t e = 0; e < job->lot.num_experts; e++) {
        for (int64_t i = job->first[e]; !job->plans[e].packs && i < job->first[e + 1]; i++) {
            int64_t *slot = &slot_of[job->tokens[i]];
            if (*slot < 0) {
                job->distinct[job->num_distinct] = job->tokens[i];
                *slot = job->num_distinct++;
            }
            job->slot[i] = *slot;
        }
    }
}

static bool all_within(const int64_t *values, int64_t count, int64_t limit) {
    bool within = true;
    for (int64_t i = 0; i < count; i++) {
        within &= (uint64_t)values[i] < (uint64_t)limit;
    }
    return within;
}

/* Whether all indices stay within what they index. */
static bool is_sound(const Job *job) {
    const Lot *lot = &job->lot;
    bool rising = job->first[0] == 0 && job->first[lot->num_experts] == lot->num_pairs;
    for (int64_t e = 0; e < lot->num_experts; e++) {
        rising &= job->first[e] <= job->first[e + 1];
    }
    return rising && all_within(job->experts, lot->num_experts, job->layer.num_experts) &&
           all_within(job->tokens, lot->num_pairs, lot->num_tokens) &&
           all_within(job->places, lot->num_pairs, lot->num_places);
}

/* Copy the index arrays, find the distinct tokens, cut the work into items. False without memory, or if unsound. */
static bool set_up(Job *job, const Layer *layer, const Lot *lot, const Pool *pool) {
    const int64_t n = lot->num_experts, m = lot->num_pairs, tokens = least(lot->num_tokens, m);
    job->layer = *layer;
    job->lot = *lot;
    const int64_t unit = is_packed(layer) ? BLOCK : CHUNK;
    job->in_pad = parts(layer->in_dim, unit) * unit;
    job->width_pad = parts(layer->width, unit) * unit;
    const int64_t groups = m / TILE + n; /* at most */
    job->indices = grown(job->indices, &job->room_indices, 8 * (2 * n + 1 + 3 * m + tokens + groups + lot->num_tokens));
    job->plans = grown(job->plans, &job->room_plans, n * sizeof *job->plans);
    if (!job->indices || !job->plans) {
        return false;
    }
    int64_t *at = job->indices;
    memcpy(at, lot->indices, 8 * (2 * n + 1 + 2 * m));
    job->experts = at, at += n;
    job->first = at, at += n + 1;
    job->tokens = at, at += m;
    job->places = at, at += m;
    if (!is_sound(job)) {
        return false;
    }
    job->slot = at, at += m;
    job->distinct = at, at += tokens;
    job->group_of = at, at += groups;
    plan_items(job, pool);
    find_distinct(job, at);
    number_items(job);
    const bool vectors = job->num_distinct > 0;
    job->inputs = grown(job->inputs, &job->room_inputs, 4 * job->num_distinct * job->in_pad);
    job->acts = grown(job->acts, &job->room_acts, vectors ? 4 * m * job->width_pad : 0);
    const int64_t row = 2 * TILE * job->num_groups;
    job->packed_inputs = grown(job->packed_inputs, &job->room_packed_inputs, row * layer->in_dim);
    job->packed_acts = grown(job->packed_acts, &job->room_packed_acts, row * layer->width);
    if (!job->inputs || !job->acts || !job->packed_inputs || !job->packed_acts) {
        return false;
    }
    atomic_store(&job->next, 0);
    atomic_store(&job->left, job->total);
    atomic_store(&job->to_prepare, job->num_distinct);
    atomic_store(&job->cancelled, false);
    atomic_store(&job->start_ns, 0);
    atomic_store(&job->end_ns, 0);
    atomic_store(&job->state, RUNNING);
    atomic_store(&job->holders, 1);
    job->after = NULL;
    return true;
}
