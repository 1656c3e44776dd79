/* The threads, their queue of jobs, their sleep. */

/* Under the lock. A job with none before it starts now: that threads have to wake is part of what it takes. */
static void enqueue(Pool *pool, Job *job) {
    if (pool->tail) {
        pool->tail->after = job;
    } else {
        atomic_store(&job->start_ns, now_ns());
        atomic_store(&pool->head, job);
    }
    pool->tail = job;
    job->queued = true;
}

/* Under the lock. */
static void unqueue(Pool *pool, Job *job) {
    Job *before = NULL, *at = atomic_load(&pool->head);
    while (at && at != job) {
        before = at;
        at = at->after;
    }
    if (at && before) {
        before->after = job->after;
    } else if (at) {
        atomic_store(&pool->head, job->after);
    }
    if (pool->tail == job) {
        pool->tail = before;
    }
    job->queued = false;
}

/* A job with items to take, or NULL. */
static Job *take(Pool *pool) {
    if (!atomic_load(&pool->head)) {
        return NULL; /* most looks find nothing, and all threads would want the lock at the same moment */
    }
    pthread_mutex_lock(&pool->lock);
    Job *job = atomic_load(&pool->head);
    while (job && atomic_load(&job->next) >= job->total) {
        unqueue(pool, job);
        job = atomic_load(&pool->head);
    }
    if (job) {
        atomic_fetch_add(&job->holders, 1);
    }
    pthread_mutex_unlock(&pool->lock);
    return job;
}

static void release_job(Job *job) {
    free(job->indices);
    free(job->plans);
    free(job->inputs);
    free(job->acts);
    free(job->packed_inputs);
    free(job->packed_acts);
    free(job);
}

/* Hold a job no longer; the last one keeps its memory for the next job. Nobody new can take one that is not queued. */
static void leave(Job *job) {
    Pool *pool = job->pool;
    if (atomic_fetch_sub(&job->holders, 1) > 1) {
        return;
    }
    pthread_mutex_lock(&pool->lock);
    const bool keep = !atomic_load(&pool->stop);
    if (keep) {
        job->after = pool->spare;
        pool->spare = job;
    }
    pthread_mutex_unlock(&pool->lock);
    if (!keep) {
        release_job(job);
    }
}

static void *work(void *argument) {
    Pool *pool = argument;
    for (;;) {
        const uint32_t epoch = atomic_load(&pool->epoch);
        Job *job = take(pool);
        if (job) {
            run_job(job);
            leave(job);
            continue;
        }
        if (atomic_load(&pool->stop)) {
            return NULL;
        }
        /* Layers follow one another within some 100 us, and to wake a sleeping core of a VM takes as long. */
        const int64_t until = now_ns() + pool->spin_ns;
        while (atomic_load(&pool->epoch) == epoch && (atomic_load(&pool->awake) || now_ns() < until)) {
            for (int i = 0; i < 32; i++) {
                relax();
            }
        }
        if (atomic_load(&pool->epoch) == epoch) {
            atomic_fetch_add(&pool->sleepers, 1);
            futex_wait(&pool->epoch, epoch, -1);
            atomic_fetch_sub(&pool->sleepers, 1);
        }
        /* Each thread that wakes wakes two: the one that submits pays for one, and all are up in log2 steps. */
        if (atomic_load(&pool->sleepers) > 0 && atomic_load(&pool->epoch) != epoch) {
            futex_wake(&pool->epoch, 2);
        }
    }
}

Pool *prescope_open(int num_threads, int64_t spin_ns) {
    Pool *pool = calloc(1, sizeof *pool);
    if (!pool) {
        return NULL;
    }
    pool->threads = calloc(num_threads, sizeof *pool->threads);
    pool->spin_ns = spin_ns;
    pool->tiles = may_use_tiles();
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_settype(&kind, PTHREAD_MUTEX_ADAPTIVE_NP); /* held for 20 ns: spin, do not sleep */
    pthread_mutex_init(&pool->lock, &kind);
    /* num_threads is what was really started; the caller compares. */
    while (pool->threads && pool->num_threads < num_threads &&
           pthread_create(&pool->threads[pool->num_threads], NULL, work, pool) == 0) {
        pthread_setname_np(pool->threads[pool->num_threads], "prescope-cpu");
        pool->num_threads++;
    }
    return pool;
}

/* Whether threads without work stay awake, however long, until told otherwise. */
void prescope_stay_awake(Pool *pool, int on) {
    atomic_store(&pool->awake, on);
    atomic_fetch_add(&pool->epoch, 1); /* who is about to sleep sees it */
    futex_wake(&pool->epoch, INT32_MAX);
}

int prescope_num_threads(const Pool *pool) { return pool->num_threads; }
int prescope_has_tiles(const Pool *pool) { return pool->tiles; }

/* Whether a thread ends within `most_ns`, by a clock that nobody sets. */
static bool ends(pthread_t thread, int64_t most_ns) {
    const int64_t until = now_ns() + most_ns;
    while (pthread_tryjoin_np(thread, NULL) != 0) {
        if (now_ns() >= until) {
            return false;
        }
        const struct timespec nap = {0, 50000};
        nanosleep(&nap, NULL);
    }
    return true;
}

/* Cancel what runs, end the threads; call it again, not from two threads at once, while it returns how many have not
 * ended within `most_ns`. Jobs that were not freed stay valid until they are. */
int prescope_close(Pool *pool, int64_t most_ns) {
    pthread_mutex_lock(&pool->lock);
    for (Job *job = atomic_load(&pool->head); job; job = job->after) {
        atomic_store(&job->cancelled, true);
    }
    atomic_store(&pool->stop, true);
    pthread_mutex_unlock(&pool->lock);
    atomic_fetch_add(&pool->epoch, 1);
    futex_wake(&pool->epoch, INT32_MAX);
    while (pool->num_ended < pool->num_threads) {
        if (!ends(pool->threads[pool->num_ended], most_ns)) {
            return pool->num_threads - pool->num_ended;
        }
        pool->num_ended++;
    }
    while (pool->spare) {
        Job *job = pool->spare;
        pool->spare = job->after;
        release_job(job);
    }
    return 0;
}
