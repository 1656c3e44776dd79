/* What becomes of a sum: rounding, bias, gate, and where it goes. */

INLINE uint16_t with_bias(const Job *job, int64_t e, int64_t bias, int64_t index, float sum) {
    const bool half = job->layer.half;
    uint16_t y = round_to(sum, half);
    if (bias < 0) {
        return y;
    }
    return round_to(widen(y, half) + widen(((const uint16_t *)(row_of(job, e) + bias))[index], half), half);
}

/* One feature of one pair; `u` is not looked at without a gate. */
INLINE void keep_act(const Job *job, int64_t e, int64_t pair, int64_t f, float g, float u) {
    const Layer *l = &job->layer;
    const int64_t at_g = l->gated && l->interleaved ? 2 * f : f;
    float act = l->gate[with_bias(job, e, l->up_bias, at_g, g)];
    if (l->gated) {
        const int64_t at_u = l->interleaved ? 2 * f + 1 : l->width + f;
        act = widen(round_to(act * l->value[with_bias(job, e, l->up_bias, at_u, u)], l->half), l->half);
    }
    float *row = job->acts + pair * job->width_pad;
    if (is_direct(l)) {
        ((uint16_t *)row)[f] = (uint16_t)(bits_of(act) >> 16);
    } else {
        row[place_of(l, false, f)] = act;
    }
}

INLINE void keep_out(const Job *job, int64_t e, int64_t pair, int64_t d, float sum) {
    job->lot.out[job->places[pair] * job->lot.out_stride + d] = with_bias(job, e, job->layer.down_bias, d, sum);
}
