/* Experts on CPU threads: y = down(gate(up(x))) straight from the rows of the host pool, for bfloat16 and float16.
 *
 * Built by build.py with -march=native and called through ctypes by native.py. The threads are its own (no Python, no
 * OpenMP): a Python thread that wakes must first get the interpreter's lock from a main thread that launches kernels,
 * which may hold it for 5 ms.
 *
 * Letters as elsewhere: D model width, F expert width, T tokens, m pairs of token and expert. A job is one submission;
 * its work is cut into numbered items that threads take from a counter, in this order:
 *
 *   prepare(token)        x of one token as float, in the order in which weights are unpacked
 *   pack(expert, group)   x of 16 pairs of an expert as operand of AMX tiles, if the expert has pairs enough for them
 *   up(expert, features)  a few features of act = gate(up(x)) for all pairs of the expert
 *   down(expert, outputs) a few outputs of all pairs of the expert; waits until all of the expert's features are there
 *
 * An item's result depends on nothing but its inputs, and every element is summed by one item in one order over the
 * inner dimension: so results do not depend on the number of threads, nor on a pair's company (but for the choice
 * between vectors and tiles). A thread that waits for items of lower numbers waits for running threads only, since
 * numbers are taken in order: it cannot deadlock.
 *
 * Rounding is that of the GPU kernels: fp32 sums, one rounding after each linear, one after its bias.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "basics.h"
#include "floats.h"
#include "rows.h"
#include "columns.h"
#include "packed_values.h"
#include "packed_rows.h"
#include "tiles.h"
#include "job.h"
#include "sums.h"
#include "vector_items.h"
#include "packed_items.h"
#include "tile_items.h"
#include "run.h"
#include "threads.h"
#include "plan.h"

/* NULL without memory or if an index is out of bounds. With no expert at all the job is over at once. */
Job *prescope_submit(Pool *pool, const Layer *layer, const Lot *lot) {
    pthread_mutex_lock(&pool->lock);
    Job *job = pool->spare;
    if (job) {
        pool->spare = job->after;
    }
    pthread_mutex_unlock(&pool->lock);
    if (!job && !(job = calloc(1, sizeof *job))) {
        return NULL;
    }
    job->pool = pool;
    if (!set_up(job, layer, lot, pool)) {
        release_job(job);
        return NULL;
    }
    if (job->total == 0) {
        atomic_store(&job->start_ns, now_ns());
        finish(job);
        return job;
    }
    pthread_mutex_lock(&pool->lock);
    enqueue(pool, job);
    pthread_mutex_unlock(&pool->lock);
    atomic_fetch_add(&pool->epoch, 1);
    if (atomic_load(&pool->sleepers) > 0) {
        futex_wake(&pool->epoch, 1);
    }
    return job;
}

int prescope_state(Job *job) { return (int)atomic_load(&job->state); }

/* The state after at most `timeout_ns`; spins for 50 us first. A signal ends the wait early. */
int prescope_wait(Job *job, int64_t timeout_ns) {
    const int64_t begin = now_ns(), spin = least(timeout_ns, 50000);
    while (atomic_load(&job->state) == RUNNING && now_ns() - begin < spin) {
        for (int i = 0; i < 32; i++) {
            relax();
        }
    }
    if (atomic_load(&job->state) == RUNNING && timeout_ns > spin) {
        futex_wait(&job->state, RUNNING, timeout_ns - spin);
    }
    return (int)atomic_load(&job->state);
}

void prescope_cancel(Job *job) { atomic_store(&job->cancelled, true); }

/* Start and end by CLOCK_MONOTONIC, of a job that is over. */
void prescope_span(Job *job, int64_t *start_ns, int64_t *end_ns) {
    *start_ns = atomic_load(&job->start_ns);
    *end_ns = atomic_load(&job->end_ns);
}

/* Give back a job that is over, without waiting for threads that just found nothing left in it. */
void prescope_free(Job *job) {
    pthread_mutex_lock(&job->pool->lock);
    if (job->queued) {
        unqueue(job->pool, job);
    }
    pthread_mutex_unlock(&job->pool->lock);
    leave(job);
}
