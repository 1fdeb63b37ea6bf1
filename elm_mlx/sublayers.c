/* A network's sublayers: norm, products and what lies between them, as one product in MLX's eyes. Included by cblas.c;
   made by model/sublayers.py.

   An operation costs MLX more than most of these compute. Rows are computed by the same instructions whatever their
   number, and whatever the number of threads. There are
   READ   rows of the residual stream, each with the cosines and sines of its position behind it, to queries, keys and
          values;
   WRITE  what attention gives, added to the stream;
   FEED   the stream and an FFN's output, added;
   and of rows of logits
   CHOOSE the logarithm of the sum of their exponentials, the largest of them, and where it first is;
   ORDER  their places from the least on, equals in their order, and what is no number last. */

#include <math.h>
#include <stdlib.h>

/* A norm over n values: by their root mean square, or by their deviation after the mean is taken off. */
struct norm {
  const float *weight; /* NULL: none */
  float eps;
  int kind, n;
};
enum { NO_NORM, ROOT_MEAN_SQUARE, CENTRED };

/* W a + bias; with an adapter ratio * (W a + up (down a)) + bias, where there are no ratios without them. */
struct linear {
  const float *weight, *bias;     /* outputs rows of inputs; the bias may be NULL */
  const float *down, *up, *ratio; /* `low` rows of inputs, `rank` rows of outputs, and one row of these; or NULL */
  int outputs, inputs, rank, low; /* `low` is `rank`, up to what tiles take at a time */
};

struct sublayer {
  struct description head;
  int width; /* of the residual stream */
  int heads, key_heads, head_dim, rotated; /* `rotated` of a head's values are, pairs half of them apart */
  int gated; /* silu(gate) * up, gate coming first; else silu */
  struct norm before, queries, keys, after;
  struct linear first[3], last; /* READ and FEED read by those of `first` that have outputs; WRITE, FEED add `last` */
};
/* Forgets the weights, which are freed after this; who multiplies with it later gets no numbers. */
void elm_mlx_retire(struct sublayer *s) {
  pthread_rwlock_wrlock(&living);
  s->head.kind = RETIRED;
  pthread_rwlock_unlock(&living);
}

static inline lanes silu(lanes x) {
  x = at_least(x, -87); /* where it is 1e-36 from 0 */
  return x / (1 + exponential(at_least(-x, -87)));
}

/* gate = silu(gate) * up, or without `up` silu(gate); also of what fills no register, so that all are computed alike */
static void activate(float *gate, const float *up, int n) {
  for (int at = 0; at < n; at += LANES) {
    size_t bytes = 4 * (n - at < LANES ? n - at : LANES);
    lanes left = {0}, right = {0};
    memcpy(&left, gate + at, bytes);
    if (up) memcpy(&right, up + at, bytes);
    left = up ? silu(left) * right : silu(left);
    memcpy(gate + at, &left, bytes);
  }
}

static float sum_of(const float *x, float centre, int n, int squared) {
  lanes sums[4] = {{0}};
  int at = 0;
  for (; at + LANES <= n; at += LANES) {
    lanes value = *(const lanes *)(x + at) - centre;
    lanes *sum = &sums[at / LANES % 4];
    *sum = squared ? fused(value, value, *sum) : *sum + value;
  }
  sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = total(sums);
  for (; at < n; at++) sum += squared ? (x[at] - centre) * (x[at] - centre) : x[at] - centre;
  return sum;
}

static void normalize(const struct norm *norm, const float *x, float *y, int n) {
  if (norm->kind == NO_NORM) {
    if (x != y) memcpy(y, x, 4 * n);
    return;
  }
  float centre = norm->kind == CENTRED ? sum_of(x, 0, n, 0) / n : 0;
  float scale = 1 / sqrtf(sum_of(x, centre, n, 1) / n + norm->eps);
  if (norm->weight)
    for (int i = 0; i < n; i++) y[i] = (x[i] - centre) * scale * norm->weight[i];
  else
    for (int i = 0; i < n; i++) y[i] = (x[i] - centre) * scale;
}

/* What is done row by row, and of many rows by all processors. */
struct row_work {
  const struct sublayer *s;
  const struct norm *norm;
  const float *a;
  float *c, *copy;
  long a_step, c_step, copy_step;
};

static void share_rows(compute part, const struct row_work *w, int m) {
  share(part, w, m, 1, m > FEW ? (long)m * w->s->width * 8 : 0);
}

/* c = the norm of the rows a, of which there may be a copy too. */
static void norm_rows(const void *what, int from, int to) {
  const struct row_work *w = what;
  for (int i = from; i < to; i++) {
    normalize(w->norm, w->a + i * w->a_step, w->c + i * w->c_step, w->s->width);
    if (w->copy) memcpy(w->copy + i * w->copy_step, w->a + i * w->a_step, 4 * w->s->width);
  }
}

/* A sublayer at work on m rows: the products of `first` into c, side by side. */
struct reading {
  const struct sublayer *s;
  struct product products[3], added[3]; /* the latter by adapters */
  int starts[4], m, adapted;
  float *c;
  long c_step;
};

static struct product product_of(const struct linear *l, int m, const float *a, long a_step, float *c, long c_step) {
  const struct stored *stored = stored_at(l->weight, l->outputs, l->inputs);
  return (struct product){m, l->outputs, l->inputs, 1, 1, 0, a, l->weight, c, a_step, l->inputs, c_step, stored};
}

/* All columns of some rows, by the same sums however many there are. */
static void low_rows(const void *what, int from, int to) {
  for (; from < to; from += FEW) {
    struct product p = *(const struct product *)what;
    p.m = clamp(to - from, FEW), p.a += from * p.a_step, p.c += from * p.c_step;
    columns(&p, 0, p.n);
  }
}

/* Computes `down a` of adapters beside some products of the same rows, and says in `added` what is left to add to each:
   no columns where a linear has no adapter. Returns whether one has. */
static int adapt(const struct linear *linears, const struct product *products, int count, struct product *added) {
  static _Thread_local struct memory kept;
  int m = products->m, all = 0;
  for (int part = 0; part < count; part++) all += linears[part].low;
  float *c = all ? at_least_floats(&kept, (size_t)m * all) : 0;
  for (int part = 0; part < count; part++) {
    const struct linear *l = &linears[part];
    const struct product *p = &products[part];
    struct product low = {m, l->low, l->inputs, 1, 1, 0, p->a, l->down, c, p->a_step, l->inputs, l->low};
    if (l->low) share(low_rows, &low, m, MOST, (long)m * l->low * l->inputs);
    added[part] = (struct product){m, l->low ? l->outputs : 0, l->rank, 0, 1, 1, c, l->up, p->c, l->low, l->outputs,
                                   p->c_step};
    c += (long)m * l->low;
  }
  return all;
}

/* Columns that are computed together: whole vectors, where they are not scalar products alone. */
static int portion_of(int m, int whole) { return m <= FEW && whole ? 3 * LANES : together(m); }

/* Columns of a product, and of what an adapter makes of it. */
static void adapted_columns(const struct linear *l, const struct product *p, const struct product *added, int from,
                            int to) {
  columns(p, from, to);
  if (added->n) columns(added, from, to);
  for (int i = 0; l->ratio && i < p->m; i++)
    for (int j = from; j < to; j++) p->c[i * p->c_step + j] *= l->ratio[j];
}

static void add_bias(const struct linear *l, int m, float *c, long c_step, int from, int to) {
  for (int i = 0; l->bias && i < m; i++)
    for (int j = from; j < to; j++) c[i * c_step + j] += l->bias[j];
}

static void read_columns(const void *what, int from, int to) {
  const struct reading *r = what;
  for (int part = 0; part < 3; part++) {
    int start = r->starts[part], end = r->starts[part + 1];
    int first = (from > start ? from : start) - start, last = (to < end ? to : end) - start;
    if (first >= last) continue;
    adapted_columns(&r->s->first[part], &r->products[part], &r->added[part], first, last);
    add_bias(&r->s->first[part], r->m, r->c + start, r->c_step, first, last);
  }
}

/* Columns of gates and their partners, and the activation of both. */
static void feed_columns(const void *what, int from, int to) {
  const struct reading *r = what;
  int partner = r->starts[3] / 2;
  read_columns(what, from, to);
  if (r->s->gated) read_columns(what, partner + from, partner + to);
  for (int i = 0; i < r->m; i++) {
    float *gate = r->c + i * r->c_step + from;
    activate(gate, r->s->gated ? gate + partner : 0, to - from);
  }
}

static struct reading reading_of(const struct sublayer *s, int m, const float *a, float *c, long c_step) {
  struct reading r = {.s = s, .m = m, .c = c, .c_step = c_step};
  for (int part = 0, start = 0; part < 3; part++) {
    r.products[part] = product_of(&s->first[part], m, a, s->width, c + start, c_step);
    r.starts[part + 1] = start += s->first[part].outputs;
  }
  r.adapted = adapt(s->first, r.products, 3, r.added);
  for (int part = 0; part < 3; part++)
    if (is_paired(&r.products[part])) r.products[part] = paired(&r.products[part]);
  return r;
}

/* A thread's, for its next sublayer. */
static float *scratch(size_t floats) {
  static _Thread_local struct memory kept;
  return at_least_floats(&kept, floats);
}

static void rotate(float *x, const float *turn, int head_dim, int rotated) {
  const float *cosines = turn, *sines = turn + head_dim;
  int half = rotated / 2;
  for (int i = 0; i < half; i++) {
    float low = x[i], high = x[i + half];
    x[i] = low * cosines[i] - high * sines[i];
    x[i + half] = high * cosines[i + half] + low * sines[i + half];
  }
}

/* Norms and RoPE of the queries and keys c, by the cosines and sines a. */
static void turn_rows(const void *what, int from, int to) {
  const struct row_work *w = what;
  const struct sublayer *s = w->s;
  for (int i = from; i < to; i++) {
    float *head = w->c + i * w->c_step;
    const float *turn = w->a + i * w->a_step;
    for (int h = 0; h < s->heads + s->key_heads; h++, head += s->head_dim) {
      const struct norm *norm = h < s->heads ? &s->queries : &s->keys;
      if (norm->n == s->head_dim || h == 0 || h == s->heads) normalize(norm, head, head, norm->n);
      rotate(head, turn, s->head_dim, s->rotated);
    }
  }
}

static void read_stream(const struct sublayer *s, int m, const float *a, long a_step, const float *turns, long turns_step,
                        float *c, long c_step) {
  float *normed = scratch((size_t)m * s->width);
  share_rows(norm_rows, &(struct row_work){s, &s->before, a, normed, 0, a_step, s->width, 0}, m);
  struct reading r = reading_of(s, m, normed, c, c_step);
  share(read_columns, &r, r.starts[3], portion_of(m, r.adapted), (long)m * s->width * r.starts[3]);
  share_rows(turn_rows, &(struct row_work){.s = s, .a = turns, .c = c, .a_step = turns_step, .c_step = c_step}, m);
}

struct writing {
  const struct linear *linear;
  struct product product, added;
};

static void written_columns(const void *what, int from, int to) {
  const struct writing *w = what;
  adapted_columns(w->linear, &w->product, &w->added, from, to);
}

/* c += the norm of `last` of the rows a. */
static void write_stream(const struct sublayer *s, int m, const float *a, long a_step, float *c, long c_step,
                         float *room) {
  int apart = s->after.kind != NO_NORM || s->last.ratio;
  struct product p = product_of(&s->last, m, a, a_step, apart ? room : c, apart ? s->width : c_step);
  p.beta = !apart;
  struct writing w = {&s->last, p};
  int adapted = adapt(w.linear, &p, 1, &w.added);
  if (is_paired(&p)) w.product = paired(&p);
  share(written_columns, &w, p.n, portion_of(m, adapted), (long)m * p.n * p.k);
  add_bias(&s->last, m, p.c, p.c_step, 0, s->width);
  for (int i = 0; apart && i < m; i++) {
    float *row = room + (long)i * s->width;
    normalize(&s->after, row, row, s->width);
    for (int j = 0; j < s->width; j++) c[i * c_step + j] += row[j];
  }
}

static void feed_forward(const struct sublayer *s, int m, const float *a, long a_step, float *c, long c_step) {
  long inner = 0;
  for (int part = 0; part < 3; part++) inner += s->first[part].outputs;
  float *normed = scratch((size_t)m * (s->width + inner)), *hidden = normed + (long)m * s->width;
  share_rows(norm_rows, &(struct row_work){s, &s->before, a, normed, a == c ? 0 : c, a_step, s->width, c_step}, m);
  struct reading r = reading_of(s, m, normed, hidden, inner);
  share(feed_columns, &r, s->gated ? inner / 2 : inner, portion_of(m, 1), (long)m * s->width * inner);
  write_stream(s, m, hidden, inner, c, c_step, normed);
}

/* LANES numbers of `left`, or fewer and behind them none that is larger than any. */
static inline lanes some(const float *x, long left) {
  lanes values = (lanes){0} - INFINITY;
  memcpy(&values, x, 4 * (left < LANES ? left : LANES));
  return values;
}

static void choose(const float *logits, long n, float *c) {
  lanes tops = (lanes){0} - INFINITY, sums[4] = {{0}};
  integers places = {0}, place;
  for (int i = 0; i < LANES; i++) place[i] = i;
  for (long at = 0; at < n; at += LANES, place += LANES) {
    lanes x = some(logits + at, n - at);
    integers above = x > tops;
    tops = (lanes)(((integers)x & above) | ((integers)tops & ~above));
    places = (place & above) | (places & ~above);
  }
  int best = 0;
  for (int i = 1; i < LANES; i++)
    if (tops[i] > tops[best] || (tops[i] == tops[best] && places[i] < places[best])) best = i;
  for (long at = 0; at < n; at += LANES) {
    lanes x = exponential(at_least(some(logits + at, n - at) - tops[best], -87));
    sums[at / LANES % 4] += x;
  }
  sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  c[0] = tops[best] + logf(total(sums));
  c[1] = tops[best];
  c[2] = places[best];
}

struct rows {
  const float *a;
  long a_step, n, c_step;
  float *c;
};

static void choose_rows(const void *what, int from, int to) {
  const struct rows *r = what;
  for (int i = from; i < to; i++) choose(r->a + i * r->a_step, r->n, r->c + i * r->c_step);
}

/* Sorts by eleven bits of all numbers at a time, the lowest first, each time in the order that there was. */
enum { DIGIT = 11, DIGITS = 3, VALUES = 1 << DIGIT };

static void order(const float *x, long n, float *c) {
  static _Thread_local struct memory kept;
  uint32_t *keys = (uint32_t *)at_least_floats(&kept, 4 * n), *places = keys + n, *new_keys = places + n;
  uint32_t *new_places = new_keys + n, counts[DIGITS][VALUES] = {{0}};
  for (long i = 0; i < n; i++) {
    float number = x[i] + 0.0f; /* of the two zeros one */
    uint32_t key;
    memcpy(&key, &number, 4);
    key = isnan(number) ? ~0u : key >> 31 ? ~key : key | 1u << 31;
    keys[i] = key, places[i] = i;
    for (int digit = 0; digit < DIGITS; digit++) counts[digit][key >> digit * DIGIT & (VALUES - 1)]++;
  }
  for (int digit = 0; digit < DIGITS; digit++) {
    uint32_t start = 0;
    for (int value = 0; value < VALUES; value++) {
      uint32_t count = counts[digit][value];
      counts[digit][value] = start, start += count;
    }
    for (long i = 0; i < n; i++) {
      uint32_t to = counts[digit][keys[i] >> digit * DIGIT & (VALUES - 1)]++;
      new_keys[to] = keys[i], new_places[to] = places[i];
    }
    uint32_t *old_keys = keys, *old_places = places;
    keys = new_keys, places = new_places, new_keys = old_keys, new_places = old_places;
  }
  for (long i = 0; i < n; i++) c[i] = places[i];
}

static void order_rows(const void *what, int from, int to) {
  const struct rows *r = what;
  for (int i = from; i < to; i++) order(r->a + i * r->a_step, r->n, r->c + i * r->c_step);
}

#include "whole_step.c"

static void sublayer(const struct sublayer *s, int m, int n, int k, const float *a, long a_step, float *c, long c_step) {
  if (s->head.kind == CHOOSE || s->head.kind == ORDER) {
    compute part = s->head.kind == CHOOSE ? choose_rows : order_rows;
    share(part, &(struct rows){a, a_step, k, c_step, c}, m, 1, m > 1 ? 16l * m * k : 0);
    return;
  }
  pthread_rwlock_rdlock(&living);
  int most = OWN_MANY && m > FEW ? MANY - 1 : FEW;
  for (int i = 0, rows; i < m; i += rows, a += rows * a_step, c += rows * c_step) {
    rows = m - i < most ? m - i : most;
    if (s->head.kind == READ)
      read_stream(s, rows, a, a_step, a + s->width, a_step, c, c_step);
    else if (s->head.kind == WRITE)
      write_stream(s, rows, a, a_step, c, c_step, scratch((size_t)rows * s->width));
    else if (s->head.kind == FEED)
      feed_forward(s, rows, a, a_step, c, c_step);
    else if (s->head.kind != STEP || !whole_step((const void *)s, rows, a, a_step, c, c_step))
      for (int r = 0; r < rows; r++)
        for (int j = 0; j < n; j++) c[r * c_step + j] = NAN;
  }
  pthread_rwlock_unlock(&living);
}
