/* Taking items, and waiting for those they need. */

static void wait_for(_Atomic int64_t *count) {
    int spins = 0;
    while (atomic_load_explicit(count, memory_order_acquire) > 0) {
        relax_or_yield(&spins);
    }
}

static void run_item(Job *job, int64_t item, int64_t following) {
    const bool live = !atomic_load_explicit(&job->cancelled, memory_order_relaxed);
    if (item < job->num_distinct) {
        if (live) {
            prepare(job, item);
        }
        atomic_fetch_sub_explicit(&job->to_prepare, 1, memory_order_release);
        return;
    }
#if HAS_TILES
    if (item < job->first_up) {
        const int64_t group = item - job->num_distinct;
        if (live) {
            pack(job, group);
        }
        atomic_fetch_sub_explicit(&job->plans[job->group_of[group]].packs_left, 1, memory_order_release);
        return;
    }
#endif
    const Part p = part_of(job, item);
    Plan *plan = &job->plans[p.e];
    if (live) {
        wait_for(!p.is_up ? &plan->ups_left : plan->packs ? &plan->packs_left : &job->to_prepare);
        if (job->layer.transposed) {
            columns_part(job, p);
#if HAS_TILES
        } else if (plan->packs) {
            tiles_part(job, p, following);
#endif
        } else {
            if (p.is_up && p.end == job->layer.width) {
                clear_pad(job, p);
            }
            if (is_packed(&job->layer)) {
                packed_part(job, p, following);
            } else {
                rows_part(job, p, following);
            }
        }
    }
    if (p.is_up) {
        atomic_fetch_sub_explicit(&plan->ups_left, 1, memory_order_release);
    }
}

static void finish(Job *job) {
    atomic_store(&job->end_ns, now_ns());
    if (job->lot.flag) {
        /* A GPU may wait for it, so it is set whatever happened. Release: the outputs are there before it. */
        __atomic_store_n(job->lot.flag, (int32_t)job->lot.flag_value, __ATOMIC_RELEASE);
    }
    atomic_store(&job->state, atomic_load(&job->cancelled) ? CANCELLED : DONE);
    futex_wake(&job->state, INT32_MAX);
}

static void run_job(Job *job) {
    const int64_t total = job->total, threads = job->pool->num_threads;
    int64_t item = atomic_fetch_add(&job->next, 1), zero = 0;
    if (item < total) {
        atomic_compare_exchange_strong(&job->start_ns, &zero, now_ns());
    }
    while (item < total) {
        /* The next item is taken before this one is done, so that its first bytes can be fetched at this one's end;
         * near the end of all not, where another thread would be free for it sooner. */
        const bool early = item + 3 * threads < total;
        int64_t following = early ? atomic_fetch_add(&job->next, 1) : -1;
        run_item(job, item, following);
        if (!early) {
            following = atomic_fetch_add(&job->next, 1);
        }
        if (atomic_fetch_sub(&job->left, 1) == 1) {
            finish(job);
        }
        item = following;
    }
}
