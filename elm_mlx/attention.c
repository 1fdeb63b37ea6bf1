/* Softmax attention of one key and value head, as one product: part of cblas.c.

   MLX calls for products alone, so attention comes as one whose alpha no product has, a certain NaN. It is square: c
   holds side * side numbers, the queries, row after row, room for two numbers of each, and at its end a `note`; a and b
   begin where the head's keys and values do, a position after the other. The results take the queries' place, the room
   has the largest score of each query and the sum of the weights, relative to that one's.

   Positions go by spans from the first on, and each is weighed by itself. A query's spans are then joined in their order.
   All its numbers are sums in one order, whatever queries are beside it, whatever positions it does not see, and
   whoever computes the spans: a text's logits don't depend on its company. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LEAST -3e38f /* less than any score */
enum { SPAN = 256, BLOCK = 96, CHUNK = 4 * LANES, NOTE = 16, ATTENTION = 0x7fc0a77e };
enum { WIDE = 1024 }; /* a larger head's spans are all apart: joined at once, two of a block's fill a thread's stack */

/* What stands in the note: the size of the head, the number of queries, how many of them are of one head and so of
   positions that follow each other, how many positions the first of these sees, and how many are seen at most; the bits
   of keys and values, and of codes how many share a scale, and the number of positions; what no score passes, or 0.
   Before the note stand, of codes, scales and biases of keys, and those of values. */
struct note {
  float head_dim, rows, length, seen, window, bits, group, positions, cap;
};

struct attention {
  int head_dim, rows, length, seen, window, spans, apart; /* apart: each span of a block is computed by itself */
  float scale, cap;
  struct cached keys, values;
  float *queries, *tops, *sums, *parts;
};

/* exp(x) for x up to 0, and nothing below -87. */
static inline lanes weight(lanes x) { return where(x < -87.0f, all(0), exponential(at_least(x, -87))); }

static int seen_by(const struct attention *a, int row) { return a->seen + row % a->length; }

/* cap * tanh(x / cap). */
static inline lanes capped(lanes x, float cap) {
  x = at_least(x * (2 / cap), -87);
  return cap - 2 * cap / (exponential(where(x > 87.0f, all(87), x)) + 1.0f);
}

/* Scores to weights, relative to the largest, of the positions `from` to `to`; zeros before and behind, up to `most`. */
static void soften(float *scores, int from, int to, int most, float *top, float *sum) {
  lanes largest = all(LEAST), total_weight = {0};
  for (int i = from / LANES * LANES; i < to; i += LANES) {
    lanes *x = (lanes *)(scores + i);
    for (int at = 0; at < LANES && (i < from || i + LANES > to); at++)
      if (i + at < from || i + at >= to) scores[i + at] = LEAST;
    largest = where(*x > largest, *x, largest);
  }
  *top = LEAST;
  for (int i = 0; i < LANES; i++) *top = largest[i] > *top ? largest[i] : *top;
  int i = from / LANES * LANES;
  memset(scores, 0, i * sizeof(float));
  for (; i < to; i += LANES) {
    lanes *x = (lanes *)(scores + i);
    *x = weight(*x - all(*top));
    total_weight += *x;
  }
  if (i < most) memset(scores + i, 0, (most - i) * sizeof(float));
  *sum = total(&total_weight);
}

/* Of `rows` queries from `row` on, in the span that begins at `at`: results, not divided by the sums yet, and after
   them the largest score and the sum of each. */
static void attend_span(const struct attention *a, int row, int rows, int at, float *part) {
  float scores[BLOCK * SPAN] __attribute__((aligned(64))), packed[a->head_dim * CHUNK] __attribute__((aligned(64)));
  float room[a->keys.bits == 32 ? 1 : SPAN * a->head_dim] __attribute__((aligned(64)));
  int most = 0, there = clamp(a->seen + a->length - 1 - at, SPAN);
  for (int i = 0; i < rows; i++) {
    int to = clamp(seen_by(a, row + i) - at, SPAN);
    most = to > most ? to : most;
  }
  for (int chunk = 0; chunk < most; chunk += CHUNK) {
    for (int i = 0; i < CHUNK; i += LANES) {
      int from = at + chunk + i, count = clamp(there - chunk - i, LANES);
      fetch_floats(&a->keys, from + LANES, LANES);
      pack(numbers_of(&a->keys, from, count, room), a->head_dim, count, CHUNK, a->head_dim, packed + i);
    }
    strips(&(struct product){rows, CHUNK, a->head_dim, 0, a->scale, 0, a->queries + (long)row * a->head_dim, packed,
                             scores + chunk, a->head_dim, CHUNK, SPAN}, 0, CHUNK);
  }
  float *tops = part + rows * a->head_dim, *sums = tops + rows;
  for (int i = 0; i < rows; i++) {
    int seen = seen_by(a, row + i), to = clamp(seen - at, SPAN), from = clamp(seen - a->window - at, to);
    for (int j = 0; a->cap && j < to; j += LANES) {
      lanes *x = (lanes *)(scores + i * SPAN + j);
      *x = capped(*x, a->cap);
    }
    soften(scores + i * SPAN, from, to, most, tops + i, sums + i);
  }
  const float *values = numbers_of(&a->values, at, most, room);
  strips(&(struct product){rows, a->head_dim, most, 0, 1, 0, scores, values, part, SPAN, a->head_dim, a->head_dim}, 0,
         a->head_dim);
}

/* Adds a span's part to what `rows` queries have of the spans before it; or it is the first. */
static void join(int rows, int head_dim, float *to, const float *part, int first) {
  float *tops = to + rows * head_dim, *sums = tops + rows;
  const float *more_tops = part + rows * head_dim, *more_sums = more_tops + rows;
  if (first) memcpy(to, part, rows * (head_dim + 2) * sizeof(float));
  for (int i = 0; i < rows && !first; i++) {
    if (more_sums[i] == 0) continue;
    float top = tops[i] > more_tops[i] ? tops[i] : more_tops[i];
    lanes old = weight(all(tops[i] - top)), new = weight(all(more_tops[i] - top));
    float *x = to + i * head_dim;
    const float *y = part + i * head_dim;
    for (int d = 0; d < head_dim; d++) x[d] = x[d] * old[0] + y[d] * new[0];
    sums[i] = sums[i] * old[0] + more_sums[i] * new[0];
    tops[i] = top;
  }
}

static void finish(const struct attention *a, int row, int rows, const float *part) {
  const float *sums = part + rows * a->head_dim + rows;
  for (int i = 0; i < rows; i++)
    for (int d = 0; d < a->head_dim; d++)
      a->queries[(long)(row + i) * a->head_dim + d] = part[i * a->head_dim + d] / sums[i];
  if (!a->tops) return;
  memcpy(a->tops + row, sums - rows, rows * sizeof(float));
  memcpy(a->sums + row, sums, rows * sizeof(float));
}

static int rows_of(const struct attention *a, int block) { return clamp(a->rows - block * BLOCK, BLOCK); }
static int first_span(const struct attention *a) { return clamp(a->seen - a->window, a->seen) / SPAN; }
static float *part_of(const struct attention *a, int block, int span) {
  return a->parts + ((long)block * BLOCK * a->spans + (long)rows_of(a, block) * span) * (a->head_dim + 2);
}

static void attend_some(const void *what, int from, int to) {
  const struct attention *a = what;
  for (int i = from; i < to; i++) {
    int block = a->apart ? i / a->spans : i, rows = rows_of(a, block), first = first_span(a);
    if (a->apart) {
      attend_span(a, block * BLOCK, rows, (first + i % a->spans) * SPAN, part_of(a, block, i % a->spans));
      continue;
    }
    float sum[BLOCK * (a->head_dim + 2)], part[BLOCK * (a->head_dim + 2)];
    for (int span = 0; span < a->spans; span++) {
      attend_span(a, block * BLOCK, rows, (first + span) * SPAN, part);
      join(rows, a->head_dim, sum, part, span == 0);
    }
    finish(a, block * BLOCK, rows, sum);
  }
}

static int blocks_of(const struct attention *a) { return (a->rows + BLOCK - 1) / BLOCK; }
static int tasks_of(const struct attention *a) { return a->apart ? blocks_of(a) * a->spans : blocks_of(a); }

/* Of what was computed apart. */
static void join_spans(const struct attention *a) {
  for (int block = 0; block < blocks_of(a); block++) {
    float *sum = part_of(a, block, 0);
    for (int span = 1; span < a->spans; span++) join(rows_of(a, block), a->head_dim, sum, part_of(a, block, span), 0);
    finish(a, block * BLOCK, rows_of(a, block), sum);
  }
}

/* Of several heads, the tasks of each one after the other, as many as the one with most has. */
struct several {
  const struct attention *each;
  int tasks;
};

static void attend_several(const void *what, int from, int to) {
  const struct several *s = what;
  for (int i = from; i < to; i++) {
    const struct attention *a = &s->each[i / s->tasks];
    if (i % s->tasks < tasks_of(a)) attend_some(a, i % s->tasks, i % s->tasks + 1);
  }
}

#if defined __AVX__ || defined __aarch64__
const int elm_mlx_attends = 1; /* for who asks */
static int is_attention(float alpha) {
  int32_t bits;
  memcpy(&bits, &alpha, sizeof bits);
  return bits == ATTENTION;
}
#else /* with narrower vectors OpenBLAS, which finds out what the processor has, is faster for prompts */
static int is_attention(float alpha) { return (void)alpha, 0; }
#endif

/* Keys, or values, whose scales and biases stand before `end`, which moves there. */
static struct cached noted(const struct note *note, const float *first, float **end) {
  struct cached x = {.rows = (unsigned char *)first, .head_dim = note->head_dim, .bits = note->bits, .group = note->group};
  if (!x.group) return x;
  long scales = (long)note->positions * (x.head_dim / x.group);
  x.biases = *end -= scales;
  x.scales = *end -= scales;
  return x;
}

static void attend(int side, float scale, const float *keys, const float *values, float *c) {
  static _Thread_local float *parts;
  static _Thread_local size_t room;
  struct note note;
  float *end = c + (long)side * side - NOTE;
  memcpy(&note, end, sizeof note);
  struct attention a = {.head_dim = note.head_dim, .rows = note.rows, .length = note.length, .seen = note.seen,
                        .window = note.window, .scale = scale, .cap = note.cap};
  a.values = noted(&note, values, &end);
  a.keys = noted(&note, keys, &end);
  a.spans = (a.seen + a.length - 1 + SPAN - 1) / SPAN - first_span(&a);
  a.queries = c, a.tops = c + (long)a.rows * a.head_dim, a.sums = a.tops + a.rows;
  a.apart = blocks_of(&a) < 8 || a.head_dim > WIDE;
  size_t needed = a.apart ? (size_t)a.rows * a.spans * (a.head_dim + 2) * sizeof(float) : 0;
  if (needed > room) {
    free(parts);
    parts = malloc(room = needed);
    if (!parts) room = 0, a.apart = 0;
  }
  a.parts = parts;
  long multiplications = 2L * a.rows * a.head_dim * a.spans * SPAN;
  share(attend_some, &a, tasks_of(&a), 1, multiplications);
  if (a.apart) join_spans(&a);
}
