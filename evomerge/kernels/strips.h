/* Strips: short runs of elements on their way through a core's first cache.
 *
 * Read from any dtype as float32, drawn random numbers for, and rounded, checksummed and written.
 * Every strip is worked on whole; the last one of a tensor is filled up with zeros.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { STRIP = 512 };
enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { GROUP = 4 }; /* models served by one call of Philox */

#if defined(__AVX512F__)
enum { REGISTER = 64 };
#elif defined(__AVX__)
enum { REGISTER = 32 };
#else
enum { REGISTER = 16 };
#endif

typedef float Floats __attribute__((vector_size(REGISTER)));
typedef int32_t Ints __attribute__((vector_size(REGISTER)));
typedef uint32_t Words __attribute__((vector_size(REGISTER)));
typedef uint64_t Longs __attribute__((vector_size(REGISTER)));
typedef int64_t SignedLongs __attribute__((vector_size(REGISTER)));

enum { LANES = REGISTER / sizeof(float), LONG_LANES = REGISTER / sizeof(uint64_t) };

#define EACH_VECTOR(p) for (int p = 0; p < STRIP; p += LANES)

typedef Floats Anywhere __attribute__((aligned(4)));

static inline Floats load(const float *from) { return *(const Anywhere *)from; }

static const uint64_t LOW_HALF = 0xffffffff;

/* Two words in each lane, the first in the lower half. */
static inline Longs load_pairs(const uint32_t *from) {
    Longs x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float *to, Floats x) { *(Anywhere *)to = x; }

/* Comparisons give lanes of all ones or all zeros. */
static inline Floats only(Ints where, Floats x) { return (Floats)(where & (Ints)x); }

static inline Floats choose(Ints where, Floats x, Floats y) {
    return (Floats)((where & (Ints)x) | (~where & (Ints)y));
}

static inline Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

static inline Floats all(float x) { return x - (Floats){0}; }

/* The larger or smaller of a number and 0; NaN stays. */
static inline Floats above_zero(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x);
#else
    return only(~(x < 0.0f), x);
#endif
}

static inline Floats below_zero(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_min_ps(_mm512_setzero_ps(), (__m512)x);
#else
    return only(~(x > 0.0f), x);
#endif
}

/* 1 where something holds and 0 elsewhere; what is multiplied by it keeps its sign, and its NaN. */
static inline Floats one(Ints where) { return only(where, all(1.0f)); }

/* ---- reading */

static inline int64_t bytes_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

static void widen(const void *from, int64_t dtype, float *to) {
    if (dtype == BFLOAT16) {
        const uint16_t *bits = from;
        for (int p = 0; p < STRIP; p++) {
            uint32_t wide = (uint32_t)bits[p] << 16;
            memcpy(to + p, &wide, sizeof wide);
        }
    } else {
#if defined(__F16C__)
        const uint16_t *bits = from;
        for (int p = 0; p < STRIP; p += 8)
            _mm256_storeu_ps(to + p, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(bits + p))));
#else
        const _Float16 *halves = from;
        for (int p = 0; p < STRIP; p++) to[p] = (float)halves[p];
#endif
    }
}

/* Return `count` elements as float32, in place or in `space`; zeros follow up to a whole strip. */
static const float *read_strip(const char *from, int64_t dtype, int count, float *space) {
    char whole[STRIP * sizeof(float)];
    if (count < STRIP) {
        memset(whole, 0, sizeof whole);
        memcpy(whole, from, count * bytes_of(dtype));
        from = whole;
    } else if (dtype == FLOAT32)
        return (const float *)from;
    if (dtype == FLOAT32)
        memcpy(space, from, sizeof whole);
    else
        widen(from, dtype, space);
    return space;
}

/* ---- random numbers: masks.py */

typedef struct {
    int64_t seed, name; /* seed -1: nothing is drawn */
} Key;

/* The product of the lower halves of each lane; the upper halves may hold anything. */
static inline Longs multiply_low(Longs x, uint32_t factor) {
#if defined(__AVX512F__)
    return (Longs)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
    return (Longs)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#else
    return (x & LOW_HALF) * factor;
#endif
}

enum { ROUNDS = 7 };
static const uint32_t MULTIPLIERS[] = {0xD2511F53, 0xCD9E8D57};
static const uint32_t KEY_STEPS[] = {0x9E3779B9, 0xBB67AE85};

/* Return four 32-bit numbers of each element, in the lower halves; the upper ones hold anything. */
static inline void philox(Key key, uint32_t group, Longs index, Longs drawn[GROUP]) {
    /* in the first round half of the counter is the same for all elements, then a quarter */
    uint64_t same = (uint64_t)key.name * MULTIPLIERS[1];
    Longs low = multiply_low(index, MULTIPLIERS[0]);
    Longs c0 = (index >> 32) ^ (same >> 32 ^ key.seed), c2 = (low >> 32) ^ (uint64_t)group, c3 = low;
    uint32_t k0 = key.seed + KEY_STEPS[0], k1 = KEY_STEPS[1];
    Longs high = multiply_low(c2, MULTIPLIERS[1]);
    low = multiply_low(c0, MULTIPLIERS[0]);
    c0 = (high >> 32) ^ (uint64_t)((uint32_t)same ^ k0), c2 = (low >> 32) ^ c3 ^ (uint64_t)k1;
    Longs c1 = high;
    c3 = low;
#pragma GCC unroll 8
    for (int round = 2; round < ROUNDS; round++) {
        k0 += KEY_STEPS[0], k1 += KEY_STEPS[1];
        high = multiply_low(c2, MULTIPLIERS[1]), low = multiply_low(c0, MULTIPLIERS[0]);
        c0 = (high >> 32) ^ c1 ^ (uint64_t)k0, c1 = high;
        c2 = (low >> 32) ^ c3 ^ (uint64_t)k1, c3 = low;
    }
    drawn[0] = c0, drawn[1] = c1, drawn[2] = c2, drawn[3] = c3;
}

/* Draw 32-bit numbers for each element of a strip: those of the first `num_models` of a group. */
static void draw(Key key, uint32_t group, int64_t first, int num_models, uint32_t word[][STRIP]) {
    Longs even = {0};
    for (int lane = 0; lane < LONG_LANES; lane++) even[lane] = 2 * lane;
    EACH_VECTOR(p) {
        Longs index = even + (uint64_t)(first + p), at_even[GROUP], at_odd[GROUP];
        philox(key, group, index, at_even);
        philox(key, group, index + 1, at_odd);
        for (int i = 0; i < num_models; i++) {
            Longs both = (at_even[i] & LOW_HALF) | at_odd[i] << 32;
            memcpy(word[i] + p, &both, sizeof both);
        }
    }
}

/* ---- writing */

/* What is known of the elements written so far. */
typedef struct {
    uint64_t checksum;
    int not_finite;
} Seen;

static void round_to_bfloat16(const float *from, uint16_t *to) {
    for (int p = 0; p < STRIP; p++) {
        uint32_t bits;
        memcpy(&bits, from + p, sizeof bits);
        bits = from[p] != from[p] ? 0x7fc00000 : bits + 0x7fff + (bits >> 16 & 1);
        to[p] = bits >> 16;
    }
}

static void round_to_float16(const float *from, void *to) {
#if defined(__F16C__)
    for (int p = 0; p < STRIP; p += 8)
        _mm_storeu_si128((__m128i *)to + p / 8, _mm256_cvtps_ph(_mm256_loadu_ps(from + p), 0));
#else
    _Float16 *halves = to;
    for (int p = 0; p < STRIP; p++) halves[p] = (_Float16)from[p];
#endif
}

/* Carry each number over to the next bfloat16 by chance: reference.dithered. */
static void dither(Key key, int64_t first, float *merged) {
    uint32_t word[1][STRIP];
    draw(key, UINT32_MAX, first, 1, word);
    for (int p = 0; p < STRIP; p++) {
        uint32_t bits;
        memcpy(&bits, merged + p, sizeof bits);
        bits = (bits + (word[0][p] & 0xffff)) & 0xffff0000;
        memcpy(merged + p, &bits, sizeof bits);
    }
}

/* Add the mixed 64-bit words: checksums.tensor_checksum. */
static uint64_t checksum(const uint64_t *word, int count, uint64_t index) {
    uint64_t sum = 0, position = index * 0x9E3779B97F4A7C15;
    for (int i = 0; i < count; i++) {
        uint64_t mixed = word[i] + position + i * 0x9E3779B97F4A7C15;
        mixed *= 0xBF58476D1CE4E5B9;
        mixed ^= mixed >> 32;
        mixed *= 0x94D049BB133111EB;
        sum += mixed ^ mixed >> 29;
    }
    return sum;
}

/* Whether an exponent is all ones; the strip's bits are looked at without their signs. */
static int has_not_finite(const void *strip, int64_t dtype) {
    if (dtype == FLOAT32) {
        const uint32_t *bits = strip;
        uint32_t largest = 0;
        for (int p = 0; p < STRIP; p++) {
            uint32_t shifted = bits[p] << 1;
            largest = shifted > largest ? shifted : largest;
        }
        return largest >= 0xff000000;
    }
    const uint16_t *bits = strip;
    uint16_t largest = 0;
    for (int p = 0; p < STRIP; p++) {
        uint16_t shifted = bits[p] << 1;
        largest = shifted > largest ? shifted : largest;
    }
    return largest >= (dtype == BFLOAT16 ? 0xff00 : 0xf800);
}

/* Write elements that will not be read soon past the caches, where that can be done. */
static void copy_out(char *to, const char *from, int64_t bytes) {
#if defined(__AVX512F__)
    if ((uintptr_t)to % 64 == 0 && bytes % 64 == 0) {
        for (int64_t at = 0; at < bytes; at += 64)
            _mm512_stream_si512((void *)(to + at), _mm512_load_si512((const void *)(from + at)));
        return;
    }
#elif defined(__AVX__)
    if ((uintptr_t)to % 32 == 0 && bytes % 32 == 0) {
        for (int64_t at = 0; at < bytes; at += 32)
            _mm256_stream_si256((void *)(to + at), _mm256_load_si256((const void *)(from + at)));
        return;
    }
#endif
    memcpy(to, from, bytes);
}

/* Round a strip, of which `count` elements are the tensor's, and write it to the output at `first`. */
static void write_strip(float *merged, int count, int64_t dtype, int64_t first, char *to, Seen *seen) {
    uint16_t halves[STRIP] __attribute__((aligned(64)));
    const void *rounded = halves;
    memset(merged + count, 0, (STRIP - count) * sizeof(float));
    if (dtype == FLOAT32)
        rounded = merged;
    else if (dtype == BFLOAT16)
        round_to_bfloat16(merged, halves);
    else
        round_to_float16(merged, halves);
    int64_t bytes = count * bytes_of(dtype);
    seen->checksum += checksum(rounded, (bytes + 7) / 8, first * bytes_of(dtype) / 8);
    seen->not_finite |= has_not_finite(rounded, dtype);
    copy_out(to, rounded, bytes);
}
