/* A step of few rows through all layers, as one product in MLX's eyes. Included by cblas.c; made by model/whole_step.py.

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
   follow each other. */
struct step {
  struct description head;
  int layers, slots, capacity;
  struct norm last;
  struct layer layer[];
};

/* Memory of a step: of each row its stream, its heads, the same in another order, and a sublayer's output. */
struct step_memory {
  int of_text; /* rows of each */
  float *stream, *heads, *queries, *room, *parts;
  struct attention *each;
};

static int spans_up_to(int seen) { return (seen + SPAN - 1) / SPAN; }

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

static void keep(const struct step *s, const struct layer *l, int m, int each, const int *positions, const float *heads,
                 long step) {
  int count = l->read->key_heads, head_dim = l->read->head_dim;
  for (int i = 0; i < m; i++)
    for (int h = 0; h < count; h++) {
      const float *key = heads + i * step + (l->read->heads + h) * head_dim;
      long at = (long)(i / each * l->stored_heads + h) * s->capacity + positions[i];
      put_position(&l->keys, at, key);
      put_position(&l->values, at, key + count * head_dim);
    }
}

/* Rows of one text, by heads, become heads of its rows; or back. */
static void exchange(int m, int heads, int head_dim, float *rows, long step, float *queries, int back) {
  for (int i = 0; i < m; i++)
    for (int h = 0; h < heads; h++) {
      float *of_row = rows + i * step + h * head_dim, *of_head = queries + ((long)h * m + i) * head_dim;
      memcpy(back ? of_row : of_head, back ? of_head : of_row, 4 * head_dim);
    }
}

/* Attention of the rows' queries, which the results replace. */
static void attend_rows(const struct step *s, const struct layer *l, int m, const int *positions, struct step_memory *x,
                        long step) {
  int count = l->read->key_heads, head_dim = l->read->head_dim, group = l->read->heads / count;
  int each = x->of_text, texts = m / each, all_heads = l->read->heads * head_dim;
  long multiplications = 0;
  float *parts = x->parts;
  struct several all = {x->each, 0};
  for (int text = 0; text < texts && each > 1; text++)
    exchange(each, l->read->heads, head_dim, x->heads + text * each * step, step, x->queries + (long)text * each * all_heads, 0);
  for (int h = 0; h < texts * count; h++) {
    int text = h / count, rows = group * each;
    long start = (long)(text * l->stored_heads + h % count) * s->capacity;
    struct attention a = {.head_dim = head_dim, .rows = rows, .length = each, .seen = positions[text * each] + 1,
                          .window = l->window, .apart = 1, .scale = l->scale, .parts = parts,
                          .keys = from_position(&l->keys, start), .values = from_position(&l->values, start),
                          .queries = each > 1 ? x->queries + (long)h * rows * head_dim
                                              : x->heads + text * step + (h % count) * group * head_dim};
    a.spans = spans_up_to(a.seen + a.length - 1) - first_span(&a);
    parts += (long)rows * a.spans * (head_dim + 2);
    multiplications += 2l * rows * head_dim * a.spans * SPAN;
    x->each[h] = a;
    if (tasks_of(&a) > all.tasks) all.tasks = tasks_of(&a);
  }
  share(attend_several, &all, texts * count * all.tasks, 1, multiplications);
  for (int h = 0; h < texts * count; h++) join_spans(&x->each[h]);
  for (int text = 0; text < texts && each > 1; text++)
    exchange(each, l->read->heads, head_dim, x->heads + text * each * step, step, x->queries + (long)text * each * all_heads, 1);
}

/* Returns 0 where a row has no place in the caches. */
static int whole_step(const struct step *s, int m, const float *a, long a_step, float *c, long c_step) {
  int width = s->layer[0].read->width, positions[FEW], last = 0, most_heads = 0, each = 1;
  long widest = 0, parts = 0;
  if (m > FEW) return 0;
  for (int i = 0; i < m; i++) {
    memcpy(&positions[i], a + i * a_step + width, 4);
    if (positions[i] < 0 || positions[i] / s->capacity >= s->slots) return 0;
    if (positions[i] < s->capacity) each = i + 1;
  }
  for (int i = 0; i < m; i++) {
    positions[i] -= i / each * s->capacity;
    if (positions[i] < 0 || positions[i] >= s->capacity || m % each) return 0;
    if (positions[i] != positions[i / each * each] + i % each) return 0;
    last = positions[i] > last ? positions[i] : last;
  }
  for (int n = 0; n < s->layers; n++) {
    const struct sublayer *read = s->layer[n].read;
    long heads = read->heads + 2 * read->key_heads, own = m * read->heads * spans_up_to(last + 1) * (read->head_dim + 2l);
    widest = heads * read->head_dim > widest ? heads * read->head_dim : widest;
    parts = own > parts ? own : parts;
    most_heads = read->key_heads > most_heads ? read->key_heads : most_heads;
  }
  struct step_memory x = memory_of(s, m, widest, most_heads, parts);
  x.of_text = each;
  for (int i = 0; i < m; i++) memcpy(x.stream + (long)i * width, a + i * a_step, 4 * width);
  for (int n = 0; n < s->layers; n++) {
    const struct layer *l = &s->layer[n];
    const float *turns = a + width + 1 + l->turns * 2 * l->read->head_dim;
    read_stream(l->read, m, x.stream, width, turns, a_step, x.heads, widest);
    keep(s, l, m, each, positions, x.heads, widest);
    attend_rows(s, l, m, positions, &x, widest);
    write_stream(l->write, m, x.heads, widest, x.stream, width, x.room);
    feed_forward(l->feed, m, x.stream, width, x.stream, width);
  }
  for (int i = 0; i < m; i++) normalize(&s->last, x.stream + (long)i * width, c + i * c_step, width);
  return 1;
}
