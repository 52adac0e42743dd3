/* Facts of statistics.py in one pass over the tensors, bitwise as its torch code has them.

   Sums are over pieces of PIECE numbers, each by the halving tree of sums.tree_sum: number i and
   number i + half are added, until one is left. The first three halvings of a piece are done in
   registers, as its numbers are made; what is left, an eighth, stays in the cache. */
#include <stdlib.h>

#include "strips.h"

enum { PIECE = 32768 };   /* as native_statistics.PIECE */
enum { BLOCK = 128 };     /* elements that go through the registers together */
enum { WAYS = 8 };        /* elements of a piece that are added in registers: three halvings */
enum { MAX_MODELS = 32 }; /* as in native_statistics */
enum { MIDDLE = 127 };    /* as in ranks */

/* blocks are whole but for a tensor's last one: inlined with their size, loops have no remainder */
#define INLINE static inline __attribute__((always_inline))

/* What is kept of a task vector: magnitudes from `threshold` to `top`, with words up to `last`. */
typedef struct {
    int64_t end, cut_level; /* these and `above` as in tables.TieCut */
    const uint8_t *ranks;   /* of the whole tensor; not read where rank_step is 0 */
    float threshold, top, above;
    uint32_t last, rank_step;
    int32_t lane;  /* position of the model in the recipe */
    int32_t draws; /* whether random numbers matter */
    int32_t cuts;  /* whether ties are cut */
} Kept;

/* A base and its parents, and what is to be done with them. */
typedef struct {
    const void *base; /* NULL where there is none */
    const void *const *sources;
    const int32_t *dtypes; /* of the sources */
    const Kept *kept;      /* one per source, where kind is KEPT */
    int64_t size;
    int32_t base_dtype, num_models, kind;
    uint32_t seed, name; /* what random numbers are drawn for */
    float number;        /* spread from which on elements count, or magnitude above which they do */
} Tensors;

enum { VECTORS, KEPT, SQUARES, VARYING, SHARES };

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float float_of_half(uint16_t half) {
    const uint32_t size = half & 0x7FFFu;
    /* the exponents' biases differ by 112; a product puts subnormal numbers right as well */
    const uint32_t bits = bits_of(float_of(size << 13) * 0x1p112f);
    const uint32_t not_finite = size >= 0x7C00u ? 0x7F800000u : 0;
    return float_of(bits | not_finite | (uint32_t)(half & 0x8000u) << 16);
}

/* Read numbers of any dtype as float32, less those of the base; where that is NULL, themselves. */
INLINE void read_block(const void *data, int dtype, int64_t first, int count, const float *base,
                       float *out) {
    if (dtype == BFLOAT16) {
        const uint16_t *from = (const uint16_t *)data + first;
        for (int i = 0; i < count; i++)
            out[i] = float_of((uint32_t)from[i] << 16) - (base ? base[i] : 0);
    } else if (dtype == FLOAT16) {
        const uint16_t *from = (const uint16_t *)data + first;
        for (int i = 0; i < count; i++) out[i] = float_of_half(from[i]) - (base ? base[i] : 0);
    } else {
        const float *from = (const float *)data + first;
        for (int i = 0; i < count; i++) out[i] = from[i] - (base ? base[i] : 0);
    }
}

/* Read the base. */
INLINE void load_base(const Tensors *tensors, int64_t first, int count, float *base) {
    if (tensors->base) read_block(tensors->base, tensors->base_dtype, first, count, NULL, base);
}

/* Read a task vector, or the source itself where there is no base. */
INLINE void load_vector(const Tensors *tensors, int model, int64_t first, int count,
                        const float *base, float *out) {
    const void *data = tensors->sources[model];
    const int dtype = tensors->dtypes[model];
    if (tensors->base) read_block(data, dtype, first, count, base, out);
    else read_block(data, dtype, first, count, NULL, out);
}

/* Draw a random number of four models for each element of a block. */
INLINE void draw_block(const Tensors *tensors, uint32_t group, int64_t first,
                       uint32_t words[GROUP][BLOCK]) {
    const Key key = {tensors->seed, tensors->name};
    Longs even;
    for (int lane = 0; lane < LONG_LANES; lane++) even[lane] = first + 2 * lane;
#pragma GCC unroll 4 /* a round waits for the one before: several elements at once */
    for (int i = 0; i < BLOCK; i += LANES) {
        Longs at_even[GROUP], at_odd[GROUP];
        philox(key, group, even + (uint64_t)i, at_even);
        philox(key, group, even + (uint64_t)(i + 1), at_odd);
        for (int lane = 0; lane < GROUP; lane++) {
            const Longs both = (at_even[lane] & 0xffffffff) | at_odd[lane] << 32;
            memcpy(words[lane] + i, &both, sizeof both);
        }
    }
}

/* Ask for a block of every tensor that will be read a piece later; it may lie behind the end. */
INLINE void fetch_block(const Tensors *tensors, int64_t first) {
    for (int m = tensors->base ? -1 : 0; m < tensors->num_models; m++) {
        const int bytes = (m < 0 ? tensors->base_dtype : tensors->dtypes[m]) == FLOAT32 ? 4 : 2;
        const char *data = (const char *)(m < 0 ? tensors->base : tensors->sources[m]) + first * bytes;
        for (int i = 0; i < BLOCK * bytes; i += 64) __builtin_prefetch(data + i, 0, 2);
        if (m < 0 || tensors->kind != KEPT || !tensors->kept[m].rank_step) continue;
        for (int i = 0; i < BLOCK; i += 64)
            __builtin_prefetch(tensors->kept[m].ranks + first + i, 0, 2);
    }
}

/* Give the magnitudes of a task vector, 0 where it is dropped. */
INLINE void keep(const Kept *kept, int64_t first, int count, const uint32_t *words, float *vector,
                 double *row) {
    const float threshold = kept->threshold, top = kept->top;
    const uint32_t last = kept->last, step = kept->rank_step;
    const uint8_t *ranks = kept->ranks + first;
    if (kept->cuts) {
        for (int i = 0; i < count; i++) {
            const int stays = first + i < kept->end && (int64_t)words[i] < kept->cut_level;
            vector[i] = stays || fabsf(vector[i]) >= kept->above ? vector[i] : 0;
        }
    }
    for (int i = 0; i < count; i++) {
        const float size = fabsf(vector[i]);
        const int stays = (size >= threshold) & (size <= top);
        const uint32_t level = step ? last + step * ranks[i] : last;
        row[i] = stays & (words[i] <= level) ? size : 0;
    }
}

/* M times the variance over the models, as sce.spread. */
INLINE void spread(float vector[][BLOCK], int num_models, int count, float *out) {
    float mean[BLOCK] = {0};
    const float share = (float)(1.0 / num_models);
    for (int m = 0; m < num_models; m++)
        for (int i = 0; i < count; i++) mean[i] += vector[m][i] - vector[0][i];
    for (int i = 0; i < count; i++) mean[i] *= share, out[i] = 0;
    for (int m = 0; m < num_models; m++)
        for (int i = 0; i < count; i++) {
            const float distance = vector[m][i] - vector[0][i] - mean[i];
            out[i] += distance * distance;
        }
}

/* Make `count` numbers of every row that terms are made of, `stride` apart. */
INLINE void make_rows(const Tensors *tensors, int64_t first, int count, double *rows,
                             int64_t stride) {
    static const uint32_t no_words[BLOCK];
    float base[BLOCK], vector[MAX_MODELS][BLOCK], chosen[BLOCK];
    uint32_t words[GROUP][BLOCK];
    const int num_models = tensors->num_models;
    load_base(tensors, first, count, base);
    if (tensors->kind == VECTORS && tensors->base) {
        for (int i = 0; i < count; i++) rows[i] = base[i];
        rows += stride;
    }
    for (int m = 0, group = -1; m < num_models; m++, rows += stride) {
        load_vector(tensors, m, first, count, base, vector[m]);
        if (tensors->kind == KEPT) {
            const Kept *kept = tensors->kept + m;
            if (kept->draws && kept->lane / GROUP != group) {
                group = kept->lane / GROUP;
                draw_block(tensors, group, first, words);
            }
            const uint32_t *word = kept->draws ? words[kept->lane % GROUP] : no_words;
            keep(kept, first, count, word, vector[m], rows);
        } else if (tensors->kind == VECTORS) {
            for (int i = 0; i < count; i++) rows[i] = vector[m][i];
        }
    }
    rows -= num_models * stride;
    if (tensors->kind == SQUARES || tensors->kind == VARYING) {
        spread(vector, num_models, count, chosen);
        if (tensors->kind == VARYING)
            for (int i = 0; i < count; i++) rows[i] = chosen[i] != 0;
        else
            for (int m = 0; m < num_models; m++)
                for (int i = 0; i < count; i++)
                    rows[m * stride + i] = chosen[i] >= tensors->number ? vector[m][i] : 0;
    } else if (tensors->kind == SHARES) {
        for (int i = 0; i < count; i++) chosen[i] = 0;
        for (int m = 0; m < num_models; m++)
            for (int i = 0; i < count; i++) chosen[i] += fabsf(vector[m][i]) > tensors->number;
        for (int m = 0; m < num_models; m++)
            for (int i = 0; i < count; i++) {
                const int active = fabsf(vector[m][i]) > tensors->number;
                rows[m * stride + i] = active && chosen[i] > 1;
                rows[(num_models + m) * stride + i] = active && chosen[i] == 1;
            }
    }
}

static double tree_sum(double *value, int64_t size) {
    if (size == 0) return 0;
    while (size > 1) {
        const int64_t half = (size + 1) / 2;
        double *restrict low = value;
        const double *restrict high = value + half;
        for (int64_t i = 0; i < size - half; i++) low[i] += high[i];
        size = half;
    }
    return value[0];
}

static int num_rows(const Tensors *tensors) {
    if (tensors->kind == VARYING) return 1;
    if (tensors->kind == SHARES) return 2 * tensors->num_models;
    return tensors->num_models + (tensors->kind == VECTORS && tensors->base);
}

/* How many rows, from itself on, a row is multiplied by to give terms; 0 where it is one itself. */
static int num_products(const Tensors *tensors, int row) {
    if (tensors->kind == VECTORS) return num_rows(tensors) - row;
    return tensors->kind == SQUARES;
}

static int num_terms(const Tensors *tensors) {
    int count = 0;
    for (int row = 0; row < num_rows(tensors); row++) {
        const int products = num_products(tensors, row);
        count += products ? products : 1;
    }
    return count;
}

typedef double Doubles __attribute__((vector_size(REGISTER), aligned(8), may_alias));

INLINE Doubles halved(const Doubles v[WAYS]) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* Add WAYS numbers of a row for BLOCK places; or their products with each of several rows, whose
   sums are `stride` apart. */
INLINE void add_ways(const double *row, int products, double *out, int64_t stride) {
    for (int i = 0; i < BLOCK; i += LONG_LANES) {
        Doubles v[WAYS], product[WAYS];
        for (int t = 0; t < WAYS; t++) v[t] = *(const Doubles *)(row + t * BLOCK + i);
        if (!products) *(Doubles *)(out + i) = halved(v);
        for (int other = 0; other < products; other++) {
            const double *by = row + other * (WAYS * BLOCK) + i;
            for (int t = 0; t < WAYS; t++) product[t] = v[t] * *(const Doubles *)(by + t * BLOCK);
            *(Doubles *)(out + other * stride + i) = halved(product);
        }
    }
}

/* Sum a piece whose size is a multiple of WAYS * BLOCK. */
static void sum_ways(const Tensors *tensors, int64_t first, int64_t size, double *rows,
                     double *eighths, double *sums) {
    const int64_t way = size / WAYS;
    const int terms = num_terms(tensors);
    for (int64_t place = 0; place < way; place += BLOCK) {
        for (int t = 0; t < WAYS; t++) {
            /* in the order of the memory: many places at once are more than it foresees */
            fetch_block(tensors, first + PIECE + WAYS * place + t * BLOCK);
            make_rows(tensors, first + t * way + place, BLOCK, rows + t * BLOCK, WAYS * BLOCK);
        }
        for (int row = 0, k = 0; k < terms; row++) {
            const int products = num_products(tensors, row);
            add_ways(rows + row * (WAYS * BLOCK), products, eighths + k * way + place, way);
            k += products ? products : 1;
        }
    }
    for (int k = 0; k < terms; k++) sums[k] = tree_sum(eighths + k * way, way);
}

/* Sum a piece of any size; only the last one of a tensor comes here. */
static void sum_any(const Tensors *tensors, int64_t first, int64_t size, double *rows,
                    double *term, double *sums) {
    for (int64_t place = 0; place < size; place += BLOCK) {
        const int count = size - place < BLOCK ? (int)(size - place) : BLOCK;
        make_rows(tensors, first + place, count, rows + place, size);
    }
    for (int row = 0; row < num_rows(tensors); row++) {
        const int products = num_products(tensors, row);
        for (int other = 0; other < products || other == 0; other++) {
            const double *a = rows + row * size, *b = rows + (row + other) * size;
            for (int64_t i = 0; i < size; i++) term[i] = products ? a[i] * b[i] : a[i];
            *sums++ = tree_sum(term, size);
        }
    }
}

/* Sum every term over each piece from `start` to `stop`; sums[piece][term] are of all pieces.
   Returns 0, or -1 where there is no memory. */
int sum_pieces(const Tensors *tensors, int64_t start, int64_t stop, double *sums) {
    const int terms = num_terms(tensors);
    const int64_t last = tensors->size - (stop - 1) * PIECE; /* all others have PIECE */
    const int64_t in_any = last < PIECE ? last : 0;
    const size_t of_rows = num_rows(tensors) * (in_any > WAYS * BLOCK ? in_any : WAYS * BLOCK);
    const size_t of_terms = terms * (PIECE / WAYS) + in_any;
    double *space = malloc((of_rows + of_terms) * sizeof *space);
    if (!space) return -1;
    for (int64_t piece = start; piece < stop; piece++) {
        const int64_t first = piece * PIECE;
        const int64_t size = tensors->size - first < PIECE ? tensors->size - first : PIECE;
        (size % (WAYS * BLOCK) ? sum_any : sum_ways)(tensors, first, size, space, space + of_rows,
                                                     sums + piece * terms);
    }
    free(space);
    return 0;
}

enum { SPREAD = -1 }; /* in the place of a model */

/* The key of a magnitude: its upper 16 bits, or those of the 16-bit number that it rounds to. */
INLINE uint32_t key_of(float magnitude, int dtype) {
    const uint32_t bits = bits_of(magnitude);
    if (dtype == FLOAT32) return bits >> 16;
    if (dtype == BFLOAT16)
        return magnitude == magnitude ? (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16 : 0x7FC0u;
    if (!(magnitude < 65520.0f)) return magnitude == magnitude ? 0x7C00u : 0x7E00u;
    /* below the least normal number, adding 1/2 leaves what half-precision numbers are steps of */
    const uint32_t subnormal = bits_of(magnitude + 0.5f) - 0x3F000000u;
    const uint32_t normal = (bits - (112u << 23) + 0xFFFu + (bits >> 13 & 1)) >> 13;
    return magnitude < 0x1p-14f ? subnormal : normal;
}

INLINE void make_magnitudes(const Tensors *tensors, int model, int64_t first, int count,
                            float *out) {
    float base[BLOCK], vector[MAX_MODELS][BLOCK];
    load_base(tensors, first, count, base);
    if (model == SPREAD) {
        for (int m = 0; m < tensors->num_models; m++)
            load_vector(tensors, m, first, count, base, vector[m]);
        spread(vector, tensors->num_models, count, out);
    } else {
        load_vector(tensors, model, first, count, base, out);
        for (int i = 0; i < count; i++) out[i] = fabsf(out[i]);
    }
}

/* Make the magnitudes of a task vector, or for the model SPREAD the spreads of all of them; up to
   a block of them, which is filled up with zeros. */
static void magnitudes(const Tensors *tensors, int model, int64_t first, int64_t count,
                       float out[BLOCK]) {
    if (count == BLOCK) {
        make_magnitudes(tensors, model, first, BLOCK, out);
    } else {
        memset(out, 0, BLOCK * sizeof *out);
        make_magnitudes(tensors, model, first, (int)count, out);
    }
}

/* As magnitudes, for their keys; the keys of zeros are 0. */
static void keys_of(const Tensors *tensors, int model, int dtype, int64_t first, int64_t count,
                    uint16_t keys[BLOCK]) {
    float size[BLOCK];
    magnitudes(tensors, model, first, count, size);
    if (dtype == BFLOAT16)
        for (int i = 0; i < BLOCK; i++) keys[i] = (uint16_t)key_of(size[i], BFLOAT16);
    else if (dtype == FLOAT16)
        for (int i = 0; i < BLOCK; i++) keys[i] = (uint16_t)key_of(size[i], FLOAT16);
    else
        for (int i = 0; i < BLOCK; i++) keys[i] = (uint16_t)key_of(size[i], FLOAT32);
}

INLINE int64_t up_to_block(int64_t count) { return count < BLOCK ? count : BLOCK; }

enum { NUM_KEYS = 32768 }; /* of magnitudes, which have no sign */
enum { TURNS = 4 }; /* equal keys in a row are counted apart: a count waits for the last one's store */

/* Count the keys of a dtype from number `start` to `stop`, fewer than 2**32 of them, into
   counts[65536]. Returns 0, or -1 where there is no memory. */
int count_all(const Tensors *tensors, int model, int dtype, int64_t start, int64_t stop,
              int64_t *counts) {
    uint32_t (*turns)[NUM_KEYS] = calloc(TURNS, sizeof *turns);
    if (!turns) return -1;
    for (int64_t first = start; first < stop; first += BLOCK) {
        uint16_t keys[BLOCK];
        const int64_t count = up_to_block(stop - first);
        keys_of(tensors, model, dtype, first, count, keys);
        for (int i = 0; i < BLOCK; i++) turns[i % TURNS][keys[i]]++;
        counts[0] -= BLOCK - count; /* zeros behind the end */
    }
    for (int turn = 0; turn < TURNS; turn++)
        for (int key = 0; key < NUM_KEYS; key++) counts[key] += turns[turn][key];
    free(turns);
    return 0;
}

/* Count the lower 16 bits of the float32 magnitudes whose upper ones are `within`. */
int count_within(const Tensors *tensors, int model, uint32_t within, int64_t start, int64_t stop,
                 int64_t *counts) {
    for (int64_t first = start; first < stop; first += BLOCK) {
        float size[BLOCK];
        const int64_t count = up_to_block(stop - first);
        magnitudes(tensors, model, first, count, size);
        int num_found = 0;
        for (int i = 0; i < BLOCK; i++) num_found += bits_of(size[i]) >> 16 == within;
        for (int i = 0; num_found && i < count; i++)
            if (bits_of(size[i]) >> 16 == within) counts[bits_of(size[i]) & 0xFFFF]++;
    }
    return 0;
}

/* The rank of elements of which `less` of a row are smaller and `equal` equal, themselves too. */
INLINE uint8_t rank_of(uint64_t less, uint64_t equal, uint64_t last) {
    /* MIDDLE * (first + last place) / (n - 1), to the nearest whole number */
    if (last == 0) return MIDDLE;
    return (uint8_t)((2 * MIDDLE * (2 * less + equal - 1) + last) / (2 * last));
}

/* Rank a row by keys of 16 bits. `counts` and `table` have NUM_KEYS; counts are 0, and are again. */
static void rank_keys(const uint16_t *keys, int64_t size, uint32_t *counts, uint8_t *table,
                      uint8_t *out) {
    uint16_t low = NUM_KEYS, high = 0;
    for (int64_t i = 0; i < size; i++) {
        /* 0 is common, and far from all others */
        const uint16_t from = keys[i] ? keys[i] : NUM_KEYS;
        low = from < low ? from : low;
        high = keys[i] > high ? keys[i] : high;
    }
    for (int64_t i = 0; i < size; i++) counts[keys[i]]++;
    uint64_t less = counts[0];
    if (less) table[0] = rank_of(0, less, size - 1);
    counts[0] = 0;
    for (int key = low; key <= high; key++) {
        const uint32_t equal = counts[key];
        if (!equal) continue;
        table[key] = rank_of(less, equal, size - 1);
        less += equal;
        counts[key] = 0;
    }
    for (int64_t i = 0; i < size; i++) out[i] = table[keys[i]];
}

enum { DIGITS = 2048 }; /* a key of 31 bits in three digits of 11 */

/* Rank a row by keys of 32 bits, each in the upper half of a number with its place below it. */
static void rank_places(uint64_t *from, uint64_t *to, int64_t size, uint8_t *out) {
    for (int shift = 32; shift < 64; shift += 11) {
        uint32_t starts[DIGITS] = {0}, start = 0;
        for (int64_t i = 0; i < size; i++) starts[from[i] >> shift & (DIGITS - 1)]++;
        for (int digit = 0; digit < DIGITS; digit++) {
            const uint32_t count = starts[digit];
            starts[digit] = start;
            start += count;
        }
        for (int64_t i = 0; i < size; i++) to[starts[from[i] >> shift & (DIGITS - 1)]++] = from[i];
        uint64_t *sorted = to;
        to = from, from = sorted;
    }
    for (int64_t start = 0, stop; start < size; start = stop) {
        for (stop = start + 1; stop < size && from[stop] >> 32 == from[start] >> 32; stop++);
        const uint8_t rank = rank_of(start, stop - start, size - 1);
        for (int64_t i = start; i < stop; i++) out[(uint32_t)from[i]] = rank;
    }
}

/* Read a row's keys of 16 bits, or keys of 32 bits with their places. */
static void read_row(const Tensors *tensors, int model, int dtype, int64_t start, int64_t size,
                     uint16_t *keys, uint64_t *places) {
    for (int64_t place = 0; place < size; place += BLOCK) {
        const int64_t count = up_to_block(size - place);
        if (dtype == FLOAT32) {
            float size_of[BLOCK];
            magnitudes(tensors, model, start + place, count, size_of);
            for (int i = 0; i < count; i++)
                places[place + i] = (uint64_t)bits_of(size_of[i]) << 32 | (uint64_t)(place + i);
        } else {
            keys_of(tensors, model, dtype, start + place, count, keys + place);
        }
    }
}

/* Rank the magnitudes of a task vector within rows `start` to `stop`, of `size` numbers each and
   fewer than 2**32, as ranks.row_ranks. Returns 0, or -1 where there is no memory. */
int rank_rows(const Tensors *tensors, int model, int dtype, int64_t size, int64_t start,
              int64_t stop, uint8_t *out) {
    const int wide = dtype == FLOAT32;
    uint16_t *keys = malloc(((wide ? 0 : size) + BLOCK) * sizeof *keys);
    uint64_t *places = malloc((wide ? 2 * size : 1) * sizeof *places);
    uint32_t *counts = calloc(NUM_KEYS, sizeof *counts);
    uint8_t *table = malloc(NUM_KEYS);
    const int no_memory = !keys || !places || !counts || !table;
    for (int64_t row = no_memory ? stop : start; row < stop; row++) {
        read_row(tensors, model, dtype, row * size, size, keys, places);
        if (wide) rank_places(places, places + size, size, out + row * size);
        else rank_keys(keys, size, counts, table, out + row * size);
    }
    free(keys), free(places), free(counts), free(table);
    return no_memory ? -1 : 0;
}
