/* Native: the kernels of reference.py in C; native.py packs what is passed.
 *
 * Same operations in the same order in float32, multiply and add apart, so the same bits. Sources
 * are read once: strip by strip, each job that has these sources merges the strip and writes it.
 * Letters: M models, P elements. Every number in a struct has 64 bits, as native.py packs them.
 */

#include <pthread.h>
#include <stdlib.h>

#include "strips.h"

typedef struct {
    const char *data;
    int64_t dtype;
} Tensor;

/* Jobs on the same sources. */
typedef struct {
    int64_t first, size, num_models;
    int64_t tensors; /* where the base is, and after it the sources */
    int64_t jobs, num_jobs;
} Batch;

typedef struct {
    int64_t kind;
    int64_t numbers, integers; /* where those of the table begin */
    char *out;
    int64_t dtype;
    Key dither;
    uint64_t checksum;
    int64_t not_finite;
} Job;

typedef struct {
    const Tensor *tensors;
    const Batch *batches;
    Job *jobs;
    const float *numbers;
    const int64_t *integers;
    int64_t num_batches, most_models;
    int64_t next_unit;
} Launch;

/* What a core works with. */
typedef struct {
    float merged[STRIP] __attribute__((aligned(64)));
    uint32_t word[GROUP][STRIP] __attribute__((aligned(64))); /* drawn for: */
    Key key;
    int64_t drawn_at;
    uint32_t drawn_for;
    /* the base and M sources, then what is kept of M task vectors */
    float values[][STRIP] __attribute__((aligned(64)));
} Space;

/* A strip of all models, as float32. */
typedef struct {
    int num_models;
    int64_t first;
    int count;
    const float *base;
    const float **source;
    float (*kept)[STRIP];
    Space *space;
    const Tensor *tensor;
    int64_t start;
    int num_wanted; /* of the models, whose elements further on have been asked for */
} Strip;

typedef void (*Kernel)(Strip *, const float *numbers, const int64_t *integers, float *merged);

/* Make a kernel of `NAME_of` that has a loop of its own for each usual number of models: there the
 * sums and the numbers of the models stay in registers. */
#define FOR_ANY_NUMBER(name)                                                                       \
    static void name(Strip *strip, const float *numbers, const int64_t *integers, float *merged) { \
        (void)integers;                                                                           \
        switch (strip->num_models) {                                                               \
            case 2: return name##_of(2, strip, numbers, merged);                                   \
            case 3: return name##_of(3, strip, numbers, merged);                                   \
            case 4: return name##_of(4, strip, numbers, merged);                                   \
            default: return name##_of(strip->num_models, strip, numbers, merged);                  \
        }                                                                                          \
    }

#define INLINE static inline __attribute__((always_inline))

enum { AHEAD = 2 * STRIP };

/* Ask for the next model's elements further on: memory is to be busy while the core is. */
static void want_more(Strip *strip) {
    if (strip->num_wanted > strip->num_models) return;
    Tensor tensor = strip->tensor[strip->num_wanted++];
    int64_t bytes = bytes_of(tensor.dtype);
    const char *from = tensor.data + (strip->start + AHEAD) * bytes;
    if (tensor.data)
        for (int b = 0; b < STRIP * bytes; b += 64) __builtin_prefetch(from + b);
}

static inline Floats delta(Strip *strip, int i, int p) {
    return load(strip->source[i] + p) - load(strip->base + p);
}

/* ---- span: numbers are the base's coefficient and the sources' */

INLINE void span_of(int num_models, Strip *strip, const float *numbers, float *restrict merged) {
    const float *coefficient = numbers + 1;
    EACH_VECTOR(p) {
        Floats total = load(strip->source[0] + p) * coefficient[0];
        for (int i = 1; i < num_models; i++)
            total += load(strip->source[i] + p) * coefficient[i];
        if (strip->base) total += load(strip->base + p) * numbers[0];
        store(merged + p, total);
    }
}
FOR_ANY_NUMBER(span)

INLINE void span_of_deltas_of(int num_models, Strip *strip, const float *numbers, float *restrict merged) {
    const float *coefficient = numbers + 1;
    EACH_VECTOR(p) {
        Floats total = delta(strip, 0, p) * coefficient[0];
        for (int i = 1; i < num_models; i++) total += delta(strip, i, p) * coefficient[i];
        store(merged + p, total + load(strip->base + p) * numbers[0]);
    }
}
FOR_ANY_NUMBER(span_of_deltas)

/* ---- mask */

typedef struct {
    float lam;
    const float *scales, *weights, *thresholds, *ceilings, *aboves;
    Key key;
    int elect, normalize;
    const int64_t *levels, *rank_steps, *ranks, *ends, *cut_levels;
} Mask;

/* Take a mask apart; what no model has is NULL. */
static Mask mask_of(int num_models, const float *numbers, const int64_t *integers) {
    Mask mask = {.lam = *numbers++, .key = {integers[0], integers[1]}};
    mask.elect = integers[2], mask.normalize = integers[3];
    int has_ceilings = integers[4], has_ranks = integers[5], has_cuts = integers[6];
    mask.scales = numbers, mask.weights = numbers += num_models;
    mask.thresholds = numbers += num_models, mask.levels = integers += 7;
    if (has_ceilings) mask.ceilings = numbers += num_models;
    if (has_ranks) mask.rank_steps = integers += num_models, mask.ranks = integers += num_models;
    if (has_cuts) {
        mask.aboves = numbers += num_models;
        mask.ends = integers += num_models, mask.cut_levels = integers += num_models;
    }
    return mask;
}

enum { NO_CUT = -1 };
static const int64_t KEEP_ALL = (int64_t)1 << 32;

static int is_chance(int64_t level) { return 0 < level && level < KEEP_ALL; }

/* Return a model's random numbers, drawn unless the last job on this strip drew them. */
static const uint32_t *words_of(Strip *strip, Key key, int i) {
    Space *space = strip->space;
    uint32_t group = i / GROUP;
    int drawn = space->key.seed == key.seed && space->key.name == key.name &&
                space->drawn_at == strip->first && space->drawn_for == group;
    if (!drawn) {
        draw(key, group, strip->first, GROUP, space->word);
        space->key = key, space->drawn_at = strip->first, space->drawn_for = group;
    }
    return space->word[i % GROUP];
}

static void drop_by_rank(const Mask *mask, Strip *strip, const uint32_t *word, int i, float *kept) {
    int64_t level = mask->levels[i], step = mask->rank_steps[i];
    const uint8_t *from = (const uint8_t *)mask->ranks[i] + strip->first;
    uint32_t rank[STRIP];
    for (int p = 0; p < STRIP; p++) rank[p] = p < strip->count ? from[p] : 0;
    for (int b = 0; b < STRIP; b += 64) __builtin_prefetch(from + AHEAD + b);
    EACH_VECTOR(p) {
        Longs ranks = load_pairs(rank + p), words = load_pairs(word + p);
        SignedLongs even = (SignedLongs)(ranks & LOW_HALF) * step + level > (SignedLongs)(words & LOW_HALF);
        SignedLongs odd = (SignedLongs)(ranks >> 32) * step + level > (SignedLongs)(words >> 32);
        Ints stays = (Ints)(((Longs)even & LOW_HALF) | ((Longs)odd & ~LOW_HALF));
        store(kept + p, load(kept + p) * one(stays));
    }
}

static void cut_ties(const Mask *mask, Strip *strip, const uint32_t *word, int i, float *kept) {
    int64_t level = mask->cut_levels[i], left = mask->ends[i] - strip->first;
    int end = level == 0 || left < 0 ? 0 : left < STRIP ? left : STRIP;
    float above = mask->aboves[i];
    for (int p = 0; p < STRIP; p++) {
        int stays = p < end && (level == KEEP_ALL || word[p] < (uint32_t)level);
        kept[p] *= stays || fabsf(kept[p]) >= above ? 1.0f : 0.0f;
    }
}

/* Put a task vector's strip in `kept`, the dropped elements at 0: reference.kept_deltas. */
static void keep(const Mask *mask, Strip *strip, int i, float *restrict kept) {
    int64_t level = mask->levels[i], cut_level = mask->cut_levels ? mask->cut_levels[i] : NO_CUT;
    float threshold = mask->thresholds[i], below = nextafterf(threshold, 0);
    float ceiling = mask->ceilings ? mask->ceilings[i] : INFINITY;
    int by_rank = is_chance(level) && mask->rank_steps && mask->rank_steps[i];
    int by_level = is_chance(level) && !by_rank;
    const uint32_t *word = NULL;
    want_more(strip);
    if (is_chance(level) || is_chance(cut_level)) word = words_of(strip, mask->key, i);
    EACH_VECTOR(p) {
        Floats x = delta(strip, i, p);
        if (ceiling < INFINITY) x *= one(magnitude(x) < ceiling);
        if (threshold >= 0) x = only(~(magnitude(x) <= below), x);
        if (by_level) x *= one(*(const Words *)(word + p) < (uint32_t)level);
        if (level == 0) x *= 0.0f;
        store(kept + p, x);
    }
    if (by_rank) drop_by_rank(mask, strip, word, i, kept);
    if (cut_level != NO_CUT) cut_ties(mask, strip, word, i, kept);
}

INLINE void sum_kept(int num_models, const Mask *mask, Strip *strip, float *restrict merged) {
    EACH_VECTOR(p) {
        Floats total = load(strip->kept[0] + p) * mask->scales[0];
        for (int i = 1; i < num_models; i++)
            total += load(strip->kept[i] + p) * mask->scales[i];
        store(merged + p, total * mask->lam + load(strip->base + p));
    }
}

/* Elect signs and sum in one sweep: reference._elected. */
INLINE void elect_kept(int num_models, int normalize, const Mask *mask, Strip *strip, float *restrict merged) {
    EACH_VECTOR(p) {
        Floats plus = {0}, minus = {0}, plus_weight = {0}, minus_weight = {0};
        for (int i = 0; i < num_models; i++) {
            Floats term = load(strip->kept[i] + p) * mask->scales[i];
            plus += above_zero(term);
            minus += below_zero(term);
            if (!normalize) continue;
            plus_weight += only(term > 0.0f, all(mask->weights[i]));
            minus_weight += only(term < 0.0f, all(mask->weights[i]));
        }
        Ints plus_wins = plus + minus >= 0.0f;
        Floats total = choose(plus_wins, plus, minus);
        if (normalize) {
            Floats divisor = choose(plus_wins, plus_weight, minus_weight);
            total /= divisor + one(divisor == 0.0f);
        }
        store(merged + p, total * mask->lam + load(strip->base + p));
    }
}

INLINE void sum_up(int num_models, const Mask *mask, Strip *strip, float *merged) {
    if (!mask->elect)
        sum_kept(num_models, mask, strip, merged);
    else if (mask->normalize)
        elect_kept(num_models, 1, mask, strip, merged);
    else
        elect_kept(num_models, 0, mask, strip, merged);
}

static void mask(Strip *strip, const float *numbers, const int64_t *integers, float *merged) {
    Mask mask = mask_of(strip->num_models, numbers, integers);
    for (int i = 0; i < strip->num_models; i++) keep(&mask, strip, i, strip->kept[i]);
    switch (strip->num_models) {
        case 2: return sum_up(2, &mask, strip, merged);
        case 3: return sum_up(3, &mask, strip, merged);
        case 4: return sum_up(4, &mask, strip, merged);
        default: return sum_up(strip->num_models, &mask, strip, merged);
    }
}

/* ---- expressions of methods */

/* methods.sce.elected: numbers are the threshold and the weights. */
INLINE void sce_of(int num_models, Strip *strip, const float *numbers, float *restrict merged) {
    const float *weights = numbers + 1, smallest = 1e-6;
    EACH_VECTOR(p) {
        Floats mean = {0}, spread = {0}, total = {0}, sum = {0}, divisor = {0};
        Floats start = delta(strip, 0, p);
        for (int i = 0; i < num_models; i++) mean += delta(strip, i, p) - start;
        mean *= (float)(1.0 / num_models);
        for (int i = 0; i < num_models; i++) {
            Floats distance = delta(strip, i, p) - start - mean;
            spread += distance * distance;
        }
        Floats kept = one(spread >= numbers[0]);
        for (int i = 0; i < num_models; i++) total += delta(strip, i, p) * kept;
        Ints is_plus = total >= 0.0f;
        for (int i = 0; i < num_models; i++) {
            Floats x = delta(strip, i, p) * kept;
            Floats agrees = one((is_plus & (x > 0.0f)) | (~is_plus & (x < 0.0f)));
            sum += x * agrees * weights[i];
            divisor += agrees * weights[i];
        }
        divisor = choose(divisor < smallest, all(smallest), divisor);
        store(merged + p, sum / divisor + load(strip->base + p));
    }
}
FOR_ANY_NUMBER(sce)

/* methods.ram.joined: numbers are epsilon and the factors. */
INLINE void ram_of(int num_models, Strip *strip, const float *numbers, float *restrict merged) {
    const float *factors = numbers + 1;
    EACH_VECTOR(p) {
        Floats count = {0}, total = {0}, alone = {0};
        for (int i = 0; i < num_models; i++) {
            Floats x = delta(strip, i, p);
            Floats active = one(magnitude(x) > numbers[0]);
            x *= active;
            count += active;
            total += x;
            alone += x * factors[i];
        }
        Floats mean = total / choose(count < 1.0f, all(1.0f), count);
        store(merged + p, choose(count > 1.0f, mean, alone) + load(strip->base + p));
    }
}
FOR_ANY_NUMBER(ram)

/* methods.consensus.agreed: numbers are the least number of tasks, the weights and the factors. */
INLINE void consensus_of(int num_models, Strip *strip, const float *numbers, float *restrict merged) {
    const float *weights = numbers + 1, *factors = weights + num_models;
    EACH_VECTOR(p) {
        Floats total = {0}, needed = {0}, sum = {0};
        for (int i = 0; i < num_models; i++) total += delta(strip, i, p);
        for (int i = 0; i < num_models; i++) {
            Floats x = delta(strip, i, p);
            needed += one(magnitude(x) >= magnitude(total - x) * factors[i]);
            sum += x * weights[i];
        }
        store(merged + p, sum * one(needed >= numbers[0]) + load(strip->base + p));
    }
}
FOR_ANY_NUMBER(consensus)

/* methods.nearswap.swapped: the number is t. */
static void nearswap(
    Strip *strip, const float *numbers, const int64_t *integers, float *merged) {
    const float smallest = 1e-6;
    EACH_VECTOR(p) {
        Floats base = load(strip->base + p), source = load(strip->source[0] + p);
        Floats distance = magnitude(base - source);
        Floats share = numbers[0] / choose(distance < smallest, all(smallest), distance);
        share = choose(share > 1.0f, all(1.0f), share);
        store(merged + p, share * source + (1.0f - share) * base);
    }
}

static const Kernel KERNELS[] = {span, span_of_deltas, mask, sce, ram, consensus, nearswap};

/* ---- launch */

enum { UNIT = 64 * STRIP }; /* elements that a thread takes at once */

static int64_t units_of(const Batch *batch) { return (batch->size + UNIT - 1) / UNIT; }

/* Read a strip of a batch's sources, and let each of its jobs merge and write it. */
static void merge_strip(const Launch *launch, const Batch *batch, int64_t start, Strip *strip, Seen *seen) {
    const Tensor *tensor = launch->tensors + batch->tensors;
    float(*values)[STRIP] = strip->space->values;
    strip->first = batch->first + start;
    strip->count = batch->size - start < STRIP ? batch->size - start : STRIP;
    const float *read[1 + strip->num_models];
    for (int i = 0; i <= strip->num_models; i++) {
        const char *from = tensor[i].data + start * bytes_of(tensor[i].dtype);
        read[i] = tensor[i].data ? read_strip(from, tensor[i].dtype, strip->count, values[i]) : NULL;
    }
    strip->tensor = tensor, strip->start = start, strip->num_wanted = 0;
    strip->base = read[0], strip->source = read + 1;
    float *merged = strip->space->merged;
    for (int j = 0; j < batch->num_jobs; j++) {
        const Job *job = launch->jobs + batch->jobs + j;
        const float *numbers = launch->numbers + job->numbers;
        want_more(strip);
        KERNELS[job->kind](strip, numbers, launch->integers + job->integers, merged);
        if (job->dither.seed >= 0) dither(job->dither, strip->first, merged);
        want_more(strip);
        char *to = job->out + start * bytes_of(job->dtype);
        write_strip(merged, strip->count, job->dtype, strip->first, to, seen + j);
    }
    while (strip->num_wanted <= strip->num_models) want_more(strip);
}

static void merge_unit(Launch *launch, const Batch *batch, int64_t start, Space *space) {
    Seen seen[batch->num_jobs];
    memset(seen, 0, sizeof seen);
    Strip strip = {.num_models = batch->num_models, .space = space};
    strip.kept = space->values + batch->num_models + 1;
    int64_t stop = start + UNIT < batch->size ? start + UNIT : batch->size;
    for (; start < stop; start += STRIP) merge_strip(launch, batch, start, &strip, seen);
    for (int j = 0; j < batch->num_jobs; j++) {
        Job *job = launch->jobs + batch->jobs + j;
        __atomic_fetch_add(&job->checksum, seen[j].checksum, __ATOMIC_RELAXED);
        __atomic_fetch_or(&job->not_finite, seen[j].not_finite, __ATOMIC_RELAXED);
    }
}

/* Take units until none is left. Sums of integers do not depend on who adds what. */
static void *work(void *argument) {
    Launch *launch = argument;
    Space *space = aligned_alloc(64, sizeof(Space) + (2 * launch->most_models + 1) * sizeof(float[STRIP]));
    if (!space) return NULL;
    space->drawn_at = -1;
    int64_t passed = 0;
    for (int64_t b = 0;;) {
        int64_t unit = __atomic_fetch_add(&launch->next_unit, 1, __ATOMIC_RELAXED);
        while (b < launch->num_batches && unit >= passed + units_of(launch->batches + b))
            passed += units_of(launch->batches + b++);
        if (b == launch->num_batches) break;
        merge_unit(launch, launch->batches + b, (unit - passed) * UNIT, space);
    }
    free(space);
    return argument;
}

/* Carry out a launch by a number of threads; 0 if there was memory to work with. */
int carry_out(Launch *launch, int num_threads) {
    pthread_t thread[num_threads];
    int num_started = 0;
    while (num_started < num_threads - 1 && !pthread_create(thread + num_started, NULL, work, launch))
        num_started++;
    int failed = !work(launch);
    for (int i = 0; i < num_started; i++) pthread_join(thread[i], NULL);
    return failed;
}
