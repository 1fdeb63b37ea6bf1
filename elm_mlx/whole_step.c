/* A step of few rows, or a piece of a prompt, through all layers, as one product in MLX's eyes. Included by cblas.c; made
   by model/whole_step.py.

   Layers are three calls and attention each (sublayers.c, attention.c), and for so little MLX takes longer to dispatch
   them than they take. Here nothing comes between, and the other threads stay awake. Keys and values are written where
   the caches have theirs: whoever made the step has seen to it that this memory is nobody else's, and is there until
   the step is done. */

struct layer {
  const struct sublayer *read, *write, *feed;
  struct cached keys, values; /* of all slots, of which each has `stored_heads` with `capacity` positions */
  int stored_heads;
  float scale;
  int window, turns; /* which of the rows' cosines and sines are its */
};

/* A row comes as its residual stream, its place, which is the number of its slot times `capacity` and its position, and
   cosines and sines. As many rows have each slot, the first ones in their order: they are of one text, at positions that
   follow each other. Of one text alone the first rows may be those whose keys and values are wanted and nothing else:
   their place is the complement of that number, and the last layer computes no more of them. */
struct step {
  struct description head;
  int layers, slots, capacity;
  struct norm last;
  struct layer layer[];
};

/* Memory of a step: of each row its stream, its heads, the same in another order, and a sublayer's output. */
struct step_memory {
  float *stream, *heads, *queries, *room, *parts;
  struct attention *each;
};

/* Rows at work: those of `texts` texts, as many of each, at their positions. */
struct placed {
  const struct step *s;
  const struct layer *l;
  int m, each, threads; /* `processors`, which another thread may change: memory is laid out by it */
  const int *positions;
  float *heads, *queries;
  long step; /* from a row's heads to the next one's */
};

static int spans_up_to(int seen) { return (seen + SPAN - 1) / SPAN; }

/* Whether spans are computed by themselves and then joined: where there is little else to share out. */
static int is_apart(const struct sublayer *read, int m, int each, int threads) {
  int rows = read->heads / read->key_heads * each, tasks = m / each * read->key_heads * ((rows + BLOCK - 1) / BLOCK);
  return each <= FEW || tasks < 4 * threads || read->head_dim > WIDE;
}

static struct step_memory memory_of(const struct step *s, int m, long widest, int most_heads, long part_rows) {
  static _Thread_local struct memory kept;
  int width = s->layer[0].read->width;
  long floats = m * (2l * width + 2 * widest) + part_rows, heads = (long)m * most_heads;
  struct step_memory x;
  x.stream = at_least_floats(&kept, floats + (heads * sizeof(struct attention) + 3) / 4 + 16);
  x.room = x.stream + (long)m * width;
  x.heads = x.room + (long)m * width;
  x.queries = x.heads + m * widest;
  x.parts = x.queries + m * widest;
  x.each = (void *)(((uintptr_t)(x.parts + part_rows) + 63) / 64 * 64);
  return x;
}

/* Keys and values of rows go where the caches have them. */
static void keep_rows(const void *what, int from, int to) {
  const struct placed *w = what;
  const struct layer *l = w->l;
  int count = l->read->key_heads, head_dim = l->read->head_dim;
  for (int i = from; i < to; i++)
    for (int h = 0; h < count; h++) {
      const float *key = w->heads + i * w->step + (l->read->heads + h) * head_dim;
      long at = (long)(i / w->each * l->stored_heads + h) * w->s->capacity + w->positions[i];
      put_position(&l->keys, at, key);
      put_position(&l->values, at, key + count * head_dim);
    }
}

/* The queries of each text's rows become rows of its heads; or back. */
static void exchange(const struct placed *w, int from, int to, int back) {
  int heads = w->l->read->heads, head_dim = w->l->read->head_dim;
  for (int i = from; i < to; i++)
    for (int h = 0; h < heads; h++) {
      long row = ((long)i / w->each * heads + h) * w->each + i % w->each;
      float *of_row = w->heads + i * w->step + h * head_dim, *of_head = w->queries + row * head_dim;
      memcpy(back ? of_row : of_head, back ? of_head : of_row, 4 * head_dim);
    }
}
static void by_heads(const void *what, int from, int to) { exchange(what, from, to, 0); }
static void by_rows(const void *what, int from, int to) { exchange(what, from, to, 1); }

static void share_placed(compute part, const struct placed *w) {
  share(part, w, w->m, 1, w->m > FEW ? w->m * w->step * 8 : 0);
}

/* Attention of the rows' queries, which the results replace. */
static void attend_rows(const struct placed *w, const struct step_memory *x) {
  const struct layer *l = w->l;
  int count = l->read->key_heads, head_dim = l->read->head_dim, group = l->read->heads / count;
  int each = w->each, texts = w->m / each;
  long multiplications = 0;
  float *parts = x->parts;
  struct several all = {x->each, 0};
  if (each > 1) share_placed(by_heads, w);
  for (int h = 0; h < texts * count; h++) {
    int text = h / count, rows = group * each;
    long start = (long)(text * l->stored_heads + h % count) * w->s->capacity;
    struct attention a = {.head_dim = head_dim, .rows = rows, .length = each, .seen = w->positions[text * each] + 1,
                          .window = l->window, .apart = is_apart(l->read, w->m, each, w->threads),
                          .scale = l->scale, .parts = parts,
                          .keys = from_position(&l->keys, start), .values = from_position(&l->values, start),
                          .queries = each > 1 ? w->queries + (long)h * rows * head_dim
                                              : w->heads + text * w->step + (h % count) * group * head_dim};
    a.spans = spans_up_to(a.seen + a.length - 1) - first_span(&a);
    parts += a.apart ? (long)rows * a.spans * (head_dim + 2) : 0;
    multiplications += 2l * rows * head_dim * a.spans * SPAN;
    x->each[h] = a;
    if (tasks_of(&a) > all.tasks) all.tasks = tasks_of(&a);
  }
  share(attend_several, &all, texts * count * all.tasks, 1, multiplications);
  for (int h = 0; h < texts * count; h++)
    if (x->each[h].apart) join_spans(&x->each[h]);
  if (each > 1) share_placed(by_rows, w);
}

/* Returns 0 where a row has no place in the caches. */
static int whole_step(const struct step *s, int m, const float *a, long a_step, float *c, long c_step) {
  int width = s->layer[0].read->width, positions[MANY], last = 0, most_heads = 0, each = 1, wanted = m;
  int threads = processors;
  long widest = 0, parts = 0;
  for (int i = 0; i < m; i++) {
    memcpy(&positions[i], a + i * a_step + width, 4);
    if (positions[i] < 0)
      positions[i] = ~positions[i];
    else if (i < wanted)
      wanted = i;
    if (positions[i] / s->capacity >= s->slots) return 0;
    if (positions[i] < s->capacity) each = i + 1;
  }
  if (wanted && each < m) return 0;
  for (int i = 0; i < m; i++) {
    positions[i] -= i / each * s->capacity;
    if (positions[i] < 0 || positions[i] >= s->capacity || m % each) return 0;
    if (positions[i] != positions[i / each * each] + i % each) return 0;
    last = positions[i] > last ? positions[i] : last;
  }
  for (int n = 0; n < s->layers; n++) {
    const struct sublayer *read = s->layer[n].read;
    int rows = wanted && n + 1 == s->layers ? m - wanted : m, together = rows < each ? rows : each;
    long heads = read->heads + 2 * read->key_heads;
    long own = (long)rows * read->heads * spans_up_to(last + 1) * (read->head_dim + 2);
    widest = heads * read->head_dim > widest ? heads * read->head_dim : widest;
    parts = rows && own > parts && is_apart(read, rows, together, threads) ? own : parts;
    most_heads = read->key_heads > most_heads ? read->key_heads : most_heads;
  }
  struct step_memory x = memory_of(s, m, widest, most_heads, parts);
  for (int i = 0; i < m; i++) memcpy(x.stream + (long)i * width, a + i * a_step, 4 * width);
  for (int n = 0, from = 0; n < s->layers; n++) {
    const struct layer *l = &s->layer[n];
    const float *turns = a + width + 1 + l->turns * 2 * l->read->head_dim;
    struct placed w = {s, l, m, each, threads, positions, x.heads, x.queries, widest};
    read_stream(l->read, m, x.stream, width, turns, a_step, x.heads, widest);
    share_placed(keep_rows, &w);
    if (n + 1 == s->layers && wanted) {
      from = wanted;
      w.m = w.each = m - from, w.positions += from, w.heads += from * widest;
    }
    if (from == m) break;
    float *stream = x.stream + (long)from * width;
    attend_rows(&w, &x);
    write_stream(l->write, w.m, w.heads, widest, stream, width, x.room);
    feed_forward(l->feed, w.m, stream, width, stream, width);
  }
  for (int i = 0; i < m; i++)
    if (i < wanted)
      for (int j = 0; j < width; j++) c[i * c_step + j] = NAN;
    else
      normalize(&s->last, x.stream + (long)i * width, c + i * c_step, width);
  return 1;
}
