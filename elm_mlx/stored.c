/* Products with weights as they are stored: in bfloat16, float16, or few bits with a scale and a bias for each group.
   Included by cblas.c; described by model/stored_layers.py.

   Such a matrix stands in memory once, as it is, in the buffer that its description begins. MLX is given an array that
   begins there too and claims to be the matrix in float32, of which it never reads a number. The description lives and
   dies with the bytes that it is of, so there is no table of addresses to keep, to lock, or to be wrong when an address
   is used again.

   Of few rows numbers are widened in registers; of more than eight, where that takes long, in a cache. Either way
   the result is that of cblas.c's tiles with the widened matrix, to the bit. For prompts see many_rows.c. */

#include <stdint.h>

enum { WIDEST = 1 << 15 }; /* numbers of a row at most */
enum type { FLOAT32, BFLOAT16, FLOAT16, AFFINE_2, AFFINE_3, AFFINE_4, AFFINE_5, AFFINE_6, AFFINE_8, MXFP4, TYPES };

struct stored {
  struct description head;
  int columns, type, scale_type;
  int group;                                        /* numbers with one scale, and one bias but in MXFP4 */
  int rounding;                                     /* in many_rows.c: BFLOAT16 is multiplied by rows rounded to it */
  int64_t rows_at, row_bytes, scales_at, biases_at; /* the first and the last two in bytes from here on */
};

typedef unsigned words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef unsigned char bytes __attribute__((vector_size(LANES), aligned(1)));
#define INLINE static inline __attribute__((always_inline)) /* so that a type is known where it is asked for */

static inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

/* A number of a row of floats. */
static inline float number(enum type type, const void *row, int64_t at) {
  if (type == FLOAT32) return ((const float *)row)[at];
  uint32_t x = ((const uint16_t *)row)[at], size = x & 0x7fff;
  if (type == BFLOAT16) return float_of(x << 16);
  float y = size < 0x400 ? size * 0x1p-24f : float_of((size << 13) + (size < 0x7c00 ? 112u << 23 : 224u << 23));
  return x >> 15 ? -y : y;
}

/* LANES whole numbers of B bits, the lowest bits first, with others above them: of each what is in a word from a place
   on, and what is in the next word. */
#ifdef __AVX512F__
#define EACH(F, B)                                                                                                  \
  F(0, B), F(1, B), F(2, B), F(3, B), F(4, B), F(5, B), F(6, B), F(7, B), F(8, B), F(9, B), F(10, B), F(11, B),     \
      F(12, B), F(13, B), F(14, B), F(15, B)
#else
#define EACH(F, B) F(0, B), F(1, B), F(2, B), F(3, B), F(4, B), F(5, B), F(6, B), F(7, B)
#endif
#define ITSELF(I, B) I
#define TIMES(I, B) I *B
#define WORD(I, B) I * B / 32
#define NEXT(I, B) I * B / 32 + 1
#define PLACE(I, B) I * B % 32
#define REST(I, B) 31 - I * B % 32
#if defined __clang__ || __GNUC__ >= 12
#define PICK(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define PICK(x, ...) __builtin_shuffle(x, (words){__VA_ARGS__})
#endif
#define UNPACK(B)                                                                                                   \
  INLINE words unpack_##B(const unsigned char *from) {                                                              \
    words x = *(const words *)from, y = PICK(x, EACH(WORD, B)) >> (words){EACH(PLACE, B)};                          \
    if (32 % B) y |= PICK(x, EACH(NEXT, B)) << 1 << (words){EACH(REST, B)};                                         \
    return y;                                                                                                       \
  }
#if defined __AVX512VBMI__ /* which takes eight bits from any place of eight bytes */
#define UNPACK_NEAR(B)                                                                                              \
  INLINE words unpack_##B(const unsigned char *from) {                                                              \
    int64_t x;                                                                                                      \
    memcpy(&x, from, sizeof x);                                                                                     \
    return (words)_mm512_multishift_epi64_epi8((__m512i)(words){EACH(TIMES, B)}, _mm512_set1_epi64(x));             \
  }
#elif defined __AVX512F__
#define UNPACK_NEAR(B) UNPACK(B)
#else /* LANES of them are in a word */
#define UNPACK_NEAR(B)                                                                                              \
  INLINE words unpack_##B(const unsigned char *from) {                                                              \
    uint32_t x;                                                                                                     \
    memcpy(&x, from, sizeof x);                                                                                     \
    return ((words){0} + x) >> (words){EACH(TIMES, B)};                                                             \
  }
#endif
UNPACK_NEAR(2)
UNPACK_NEAR(3)
UNPACK_NEAR(4)
#if defined __AVX2__ && !defined __AVX512F__ /* a number is in two bytes, which are shuffled into its word */
#define BYTES(I, B) I * B / 8 | (I * B / 8 + 1) << 8 | 0x80800000
#define BIT(I, B) I * B % 8
#define UNPACK_FAR(B)                                                                                               \
  INLINE words unpack_##B(const unsigned char *from) {                                                              \
    __m256i x = _mm256_broadcastsi128_si256(_mm_loadl_epi64((const void *)from));                                   \
    return (words)_mm256_shuffle_epi8(x, (__m256i)(words){EACH(BYTES, B)}) >> (words){EACH(BIT, B)};                \
  }
#else
#define UNPACK_FAR(B) UNPACK(B)
#endif
UNPACK_FAR(5)
UNPACK_FAR(6)
INLINE words unpack_8(const unsigned char *from) {
#if defined __AVX512F__
  return (words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from));
#elif defined __AVX2__
  return (words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)from));
#else
  return __builtin_convertvector(*(const bytes *)from, words);
#endif
}

INLINE words unpack(enum type type, const unsigned char *row, unsigned at) {
  switch (type) {
    case AFFINE_2: return unpack_2(row + at / 4);
    case AFFINE_3: return unpack_3(row + at / 8 * 3);
    case AFFINE_5: return unpack_5(row + at / 8 * 5);
    case AFFINE_6: return unpack_6(row + at / 8 * 6);
    case AFFINE_8: return unpack_8(row + at);
    default: return unpack_4(row + at / 2);
  }
}

/* The values that such numbers stand for. Those of MXFP4 are floats: a sign, two bits of exponent and one more. */
INLINE lanes values_of(enum type type, words x, lanes scale, lanes bias) {
  static const unsigned masks[TYPES] = {[AFFINE_2] = 3,  [AFFINE_3] = 7,  [AFFINE_4] = 15,
                                        [AFFINE_5] = 31, [AFFINE_6] = 63, [MXFP4] = 15};
  if (type != AFFINE_8) x &= masks[type];
  if (type != MXFP4) return fused(__builtin_convertvector((integers)x, lanes), scale, bias);
  words size = x & 7, half = (words)(size == 1), whole = (words)(size > 1);
  return (lanes)((whole & ((size << 22) + (126u << 23))) | (half & (126u << 23)) | (x & 8) << 28) * scale;
}

/* What is common to a group. AVX-512 looks up values of at most four bits: then a register holds them all. */
struct group {
  lanes scale, bias, values;
};
#ifdef __AVX512F__
#define LOOKED_UP(TYPE) (TYPE == AFFINE_2 || TYPE == AFFINE_3 || TYPE == AFFINE_4 || TYPE == MXFP4)
#else
#define LOOKED_UP(TYPE) 0
#endif

INLINE struct group begin(enum type type, const float *scale, const float *bias) {
  struct group own = {0};
  if (type > FLOAT16) own.scale = all(*scale), own.bias = all(*bias);
  if (LOOKED_UP(type)) own.values = values_of(type, (words){EACH(ITSELF, 0)}, own.scale, own.bias);
  return own;
}

/* LANES numbers of a row from a place on. */
#define BITS(TYPE)                                                                                                  \
  (TYPE == FLOAT32 ? 32 : TYPE <= FLOAT16 ? 16 : TYPE <= AFFINE_6 ? TYPE - AFFINE_2 + 2 : TYPE == AFFINE_8 ? 8 : 4)
INLINE lanes read(enum type type, const unsigned char *row, int64_t at, const struct group *own) {
  if (type == FLOAT32) return *(const lanes *)((const float *)row + at);
  const uint16_t *floats = (const uint16_t *)row + at;
  if (type == BFLOAT16) return (lanes)(__builtin_convertvector(*(const halves *)floats, words) << 16);
  if (type == FLOAT16) {
#if defined __AVX512F__
    return (lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)floats));
#elif defined __F16C__
    return (lanes)_mm256_cvtph_ps(_mm_loadu_si128((const void *)floats));
#else
    lanes y;
    for (int i = 0; i < LANES; i++) y[i] = number(FLOAT16, floats, i);
    return y;
#endif
  }
  words x = unpack(type, row, at);
#ifdef __AVX512F__
  if (LOOKED_UP(type)) return (lanes)_mm512_permutexvar_ps((__m512i)x, (__m512)own->values);
#endif
  return values_of(type, x, own->scale, own->bias);
}

INLINE void widen_floats(enum type type, const unsigned char *from, float *to, int64_t count) {
  int64_t at = 0;
  for (; at + LANES <= count; at += LANES) *(lanes *)(to + at) = read(type, from, at, 0);
  for (; at < count; at++) to[at] = number(type, from, at);
}

/* Of each thread: columns that are widened, and the scales and biases of some. */
enum { TOGETHER = 12, SCRATCH = 3 * (WIDEST + 16), PANEL = 1 << 20, SMALLEST_GROUP = 32, AHEAD = 2 << 10 };
static _Thread_local float widened[SCRATCH] __attribute__((aligned(64)));
struct scales {
  float scales[TOGETHER * WIDEST / SMALLEST_GROUP], biases[TOGETHER * WIDEST / SMALLEST_GROUP];
};
static _Thread_local struct scales own_scales; /* finding them is a call, in a library: once for many rows */

static void widen_scales(enum type type, const unsigned char *from, float *to, int64_t count) {
  switch (type) {
    case FLOAT32: widen_floats(FLOAT32, from, to, count); break;
    case BFLOAT16: widen_floats(BFLOAT16, from, to, count); break;
    case FLOAT16: widen_floats(FLOAT16, from, to, count); break;
    default: /* powers of two */
      for (int64_t i = 0; i < count; i++) to[i] = from[i] ? float_of((uint32_t)from[i] << 23) : 0x1p-127f;
  }
}

static int groups_of(const struct stored *s) { return s->type > FLOAT16 ? s->columns / s->group : 0; }

/* Widens the scales and biases of up to TOGETHER rows. */
static void read_scales(const struct stored *s, int64_t row, int count, struct scales *to) {
  const unsigned char *start = (const unsigned char *)s;
  int64_t groups = groups_of(s), size = s->type == MXFP4 ? 1 : s->scale_type == FLOAT32 ? 4 : 2;
  if (!groups) return;
  for (int64_t at = size * groups * (row + count), end = at + size * groups * count; at < end; at += 64) { /* the next */
    __builtin_prefetch(start + s->scales_at + at);
    __builtin_prefetch(start + s->biases_at + at);
  }
  widen_scales(s->type == MXFP4 ? MXFP4 : s->scale_type, start + s->scales_at + size * groups * row, to->scales,
               groups * count);
  if (s->type != MXFP4)
    widen_scales(s->scale_type, start + s->biases_at + size * groups * row, to->biases, groups * count);
}

static inline const unsigned char *row_of(const struct stored *s, int64_t row) {
  return (const unsigned char *)s + s->rows_at + row * s->row_bytes;
}

/* Scalar products of I rows with J columns, as TILE's, and the scales and biases of these. What the next columns have,
   and more, is fetched meanwhile: rows are too short for a processor to see by itself what comes next. */
#define STORED_TILE(TYPE, I, J)                                                                                     \
  static void TYPE##_##I##_##J(const struct product *p, int i0, int j0, const float *scale, const float *bias) {    \
    enum { STEP = J * LANES * BITS(TYPE) / 8 };                                                                     \
    const struct stored *s = p->stored;                                                                             \
    const float *a = p->a + i0 * p->a_step;                                                                         \
    const unsigned char *row = row_of(s, j0), *next = row + J * s->row_bytes + AHEAD;                               \
    int64_t step = s->row_bytes, groups = groups_of(s);                                                             \
    unsigned at = 0, k = p->k, whole = k / LANES * LANES, group = TYPE > FLOAT16 ? (unsigned)s->group : whole;      \
    SUMS(I, J)                                                                                                      \
    for (; at < whole; scale++, bias++) {                                                                           \
      struct group own[J];                                                                                          \
      for (int j = 0; j < J; j++) own[j] = begin(TYPE, scale + j * groups, bias + j * groups);                      \
      unsigned end = at + group;                                                                                    \
      do {                                                                                                          \
        lanes right[J];                                                                                             \
        for (int q = 0; q < STEP; q += 64) __builtin_prefetch(next + q);                                            \
        for (int j = 0; j < J; j++) {                                                                               \
          right[j] = read(TYPE, row + j * step, at, &own[j]);                                                       \
          IN_REGISTER(right[j]);                                                                                    \
        }                                                                                                           \
        for (int i = 0; i < I; i++) {                                                                               \
          lanes left = *(const lanes *)(a + i * p->a_step + at);                                                    \
          IN_REGISTER(left);                                                                                        \
          for (int j = 0; j < J; j++) sums[i][j] = fused(left, right[j], sums[i][j]);                               \
        }                                                                                                           \
        at += LANES, next += STEP;                                                                                  \
      } while (at < end);                                                                                           \
    }                                                                                                               \
    for (int j = 0; j < J; j++) {                                                                                   \
      float rest[LANES];                                                                                            \
      for (unsigned q = at; q < k; q++) rest[q - at] = number(TYPE, row + j * step, q);                             \
      for (int i = 0; i < I; i++) {                                                                                 \
        float sum = total(&sums[i][j]);                                                                             \
        put(p, i0 + i, j0 + j, at < k ? with_rest(sum, a + i * p->a_step + at, rest, k - at) : sum);                \
      }                                                                                                             \
    }                                                                                                               \
  }

#define WIDEN(TYPE)                                                                                                 \
  static void widen_##TYPE(const struct stored *s, const unsigned char *row, const float *scale, const float *bias, \
                           int from, int to, float *into) {                                                         \
    scale += from / s->group, bias += from / s->group;                                                              \
    for (int at = from; at < to; scale++, bias++) {                                                                 \
      struct group own = begin(TYPE, scale, bias);                                                                  \
      for (int end = at + s->group; at < end; at += LANES) *(lanes *)(into + at - from) = read(TYPE, row, at, &own); \
    }                                                                                                               \
  }
#define WIDEN_FLOATS(TYPE)                                                                                          \
  static void widen_##TYPE(const struct stored *s, const unsigned char *row, const float *scale, const float *bias, \
                           int from, int to, float *into) {                                                         \
    (void)s, (void)scale, (void)bias;                                                                               \
    widen_floats(TYPE, row + 2 * from, into, to - from);                                                            \
  }

/* Columns that a tile of as many rows takes, of those with sums in registers: each divides TOGETHER. */
#ifdef __AVX512F__
#define EACH_TILE(F, TYPE)                                                                                          \
  F(TYPE, 1, 6) F(TYPE, 2, 6) F(TYPE, 3, 4) F(TYPE, 4, 4) F(TYPE, 5, 4) F(TYPE, 6, 3) F(TYPE, 7, 3) F(TYPE, 8, 3)
#else
#define EACH_TILE(F, TYPE) F(TYPE, 1, 3) F(TYPE, 2, 3) F(TYPE, 3, 3) F(TYPE, 4, 2)
#endif
#define ITS_COLUMNS(TYPE, I, J) J,
#define ITS_NAME(TYPE, I, J) TYPE##_##I##_##J,
#define STORED_TILES(TYPE) EACH_TILE(STORED_TILE, TYPE) STORED_TILE(TYPE, 1, 1)
#define QUANTIZED(TYPE) WIDEN(TYPE) STORED_TILES(TYPE)
WIDEN_FLOATS(BFLOAT16)
WIDEN_FLOATS(FLOAT16)
STORED_TILES(BFLOAT16)
STORED_TILES(FLOAT16)
QUANTIZED(AFFINE_2)
QUANTIZED(AFFINE_3)
QUANTIZED(AFFINE_4)
QUANTIZED(AFFINE_5)
QUANTIZED(AFFINE_6)
QUANTIZED(AFFINE_8)
QUANTIZED(MXFP4)

/* By type: tiles of one to MOST rows, of one row and one column; and what widens some of a row. */
#define LISTED(TYPE) [TYPE] = {{EACH_TILE(ITS_NAME, TYPE)}, TYPE##_1_1, widen_##TYPE}
static const struct {
  void (*few[MOST])(const struct product *, int, int, const float *, const float *);
  void (*one)(const struct product *, int, int, const float *, const float *);
  void (*widen)(const struct stored *, const unsigned char *, const float *, const float *, int, int, float *);
} kernels[TYPES] = {
    LISTED(BFLOAT16), LISTED(FLOAT16),  LISTED(AFFINE_2), LISTED(AFFINE_3), LISTED(AFFINE_4),
    LISTED(AFFINE_5), LISTED(AFFINE_6), LISTED(AFFINE_8), LISTED(MXFP4),
};

static void few_stored(const struct product *p, int from, int to) {
  static const int with[] = {EACH_TILE(ITS_COLUMNS, )};
  struct scales *own = &own_scales;
  int type = p->stored->type, groups = groups_of(p->stored);
  for (int j = from, count; j < to; j += count) {
    count = to - j < TOGETHER ? to - j : TOGETHER;
    read_scales(p->stored, j, count, own);
    for (int i = 0, rows; i < p->m; i += rows) {
      rows = p->m - i < MOST ? p->m - i : MOST;
      int line = 0, step = with[rows - 1];
      for (; line + step <= count; line += step)
        kernels[type].few[rows - 1](p, i, j + line, &own->scales[line * groups], &own->biases[line * groups]);
      for (; line < count; line++)
        for (int r = i; r < i + rows; r++)
          kernels[type].one(p, r, j + line, &own->scales[line * groups], &own->biases[line * groups]);
    }
  }
}

/* Widens of `count` rows of a stored matrix the numbers `from` to `to`, whole groups, into rows `step` numbers apart. */
static void widen(const struct stored *s, int row, int count, int from, int to, float *into, int step) {
  struct scales *own = &own_scales;
  for (int done = 0; done < count; done++) {
    int line = done % TOGETHER, first = line * groups_of(s);
    if (line == 0) read_scales(s, row + done, count - done < TOGETHER ? count - done : TOGETHER, own);
    kernels[s->type].widen(s, row_of(s, row + done), &own->scales[first], &own->biases[first], from, to,
                           into + (long)done * step);
  }
}

/* Whether widening a matrix anew for each MOST rows, in registers, is faster than once for all, in a cache. */
static int is_light(const struct stored *s) { return s->type != AFFINE_5 && s->type != AFFINE_6; }

static void stored_columns(const struct product *p, int from, int to) {
  if (p->m <= 8 || is_light(p->stored)) {
    few_stored(p, from, to);
    return;
  }
  int step = (p->k + 15) / 16 * 16 + 16, most = (1 << 16) / step / 3 * 3; /* rows that do not share lines of a cache */
  struct product panel = *p;
  panel.b = widened, panel.b_step = step, panel.stored = 0;
  for (int j = from, count; j < to; j += count) {
    count = most < 3 ? 3 : most;
    if (count > to - j) count = to - j;
    widen(p->stored, j, count, 0, p->k, widened, step);
    panel.c = p->c + j;
    columns(&panel, 0, count);
  }
}
