/* What Python hands over, and what threads share. */

/* As in native.py, field by field. */
typedef struct {
    const uint8_t *rows; /* (E, row_bytes) */
    int64_t row_bytes, num_experts;
    int64_t up, down, up_bias, down_bias; /* bytes from the row's start, -1 for none */
    int64_t in_dim, width, out_dim;       /* D, F, D */
    int32_t gated, interleaved, transposed, half;
    const float *gate, *value; /* (65536,) each: act = gate[bits of g] * value[bits of u] */
    Packing up_packing, down_packing; /* both are packed, or none */
} Layer;

typedef struct {
    const uint16_t *x; /* (T, x_stride) */
    uint16_t *out;     /* (rows, out_stride) */
    int64_t x_stride, out_stride, num_tokens, num_places, num_experts, num_pairs;
    const int64_t *indices; /* experts (n,), first (n + 1,), tokens (m,), places (m,), one after another */
    int32_t *flag;          /* set to flag_value when all is over, also if cancelled; may be NULL */
    int64_t flag_value;
} Lot;

enum { RUNNING = 0, DONE = 1, CANCELLED = 2 };

/* How one expert of a job is computed. */
typedef struct {
    int64_t up_item, down_item; /* number of the first such item */
    int64_t up_step, down_step; /* features, outputs of an item */
    int64_t packs;              /* groups of TILE pairs, 0 where vectors are used */
    int64_t first_group;        /* of them, among all of the job's */
    _Atomic int64_t packs_left, ups_left;
} Plan;

typedef struct Job {
    Layer layer;
    Lot lot;
    int64_t *indices;        /* a copy of the lot's, and room for what follows */
    const int64_t *experts;  /* (n,) */
    const int64_t *first;    /* (n + 1,) */
    const int64_t *tokens;   /* (m,) rows of x */
    const int64_t *places;   /* (m,) rows of out */
    Plan *plans;             /* (n,) */
    float *inputs;           /* (distinct tokens, in_pad), */
    float *acts;             /* (m, width_pad): as vectors need them */
    uint16_t *packed_inputs; /* (groups, D / TILE_DEPTH, TILE pairs of elements, TILE pairs of the lot, 2), */
    uint16_t *packed_acts;   /* (groups, F / TILE_DEPTH, ...): as tiles need them */
    int64_t room_indices, room_plans, room_inputs, room_acts, room_packed_inputs, room_packed_acts;
    int64_t in_pad, width_pad;
    int64_t *distinct; /* (distinct tokens,) rows of x */
    int64_t *slot;     /* (m,) row of `inputs` */
    int64_t *group_of; /* (groups,) index of the expert */
    int64_t num_distinct, num_groups, first_up, first_down, total;
    _Atomic int64_t next, left, to_prepare;
    _Atomic bool cancelled;
    _Atomic uint32_t state;
    _Atomic int64_t start_ns, end_ns;
    _Atomic int holders; /* threads at work on it, and its owner until `prescope_free` */
    bool queued;
    struct Job *after;
    struct Pool *pool;
} Job;

typedef struct Pool {
    pthread_mutex_t lock;
    _Atomic(Job *) head; /* jobs that may still have items to take, chained by `after`: changed under the lock, */
    Job *tail;           /* looked at without */
    Job *spare;          /* finished ones, kept for their memory */
    _Atomic uint32_t epoch;
    _Atomic int sleepers;
    _Atomic bool stop, awake;
    int64_t spin_ns;
    bool tiles; /* the kernel lets this process use them */
    int num_threads, num_ended;
    pthread_t *threads;
} Pool;

INLINE bool is_packed(const Layer *l) { return l->up_packing.kind != PLAIN; }

/* Whether rows of inputs hold bfloat16 in order, in half of their room, instead of floats as `unpack` gives weights. */
INLINE bool is_direct(const Layer *l) { return HAS_PRODUCTS && !l->half && !l->transposed && !is_packed(l); }

/* Where feature or input k stands in a row of activations or inputs. */
INLINE int64_t place_of(const Layer *l, bool is_up, int64_t k) {
    if (is_packed(l)) {
        return place_in_block(k, is_up ? l->up_packing.kind : l->down_packing.kind);
    }
    return l->transposed ? k : unpacked(k, l->half);
}

INLINE const uint8_t *row_of(const Job *job, int64_t e) {
    return job->layer.rows + job->experts[e] * job->layer.row_bytes;
}

/* What an item of `up` or `down` computes: features or outputs begin .. end of the e-th expert of the job. */
typedef struct {
    bool is_up;
    int64_t e, begin, end;
} Part;

static Part part_of(const Job *job, int64_t item) {
    Part p = {.is_up = item < job->first_down};
    int64_t low = 0, high = job->lot.num_experts; /* the last expert whose first item is not behind this one */
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        const Plan *plan = &job->plans[middle];
        if ((p.is_up ? plan->up_item : plan->down_item) <= item) {
            low = middle;
        } else {
            high = middle;
        }
    }
    const Plan *plan = &job->plans[low];
    const int64_t step = p.is_up ? plan->up_step : plan->down_step;
    p.e = low;
    p.begin = (item - (p.is_up ? plan->up_item : plan->down_item)) * step;
    p.end = least(p.begin + step, p.is_up ? job->layer.width : job->layer.out_dim);
    return p;
}

INLINE const float *input_of(const Job *job, bool is_up, int64_t pair) {
    return is_up ? job->inputs + job->slot[pair] * job->in_pad : job->acts + pair * job->width_pad;
}
