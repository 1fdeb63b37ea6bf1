/* Products of many rows, as a prompt has, with a matrix that is transposed, in float32 or as it is stored. Included by
   cblas.c.

   Some columns at a time, as deep as a cache holds them, are widened and laid out so that the same number of all stands
   together; then sums run along them. A row's result has the same bits whatever the number of processors, and of rows
   between FEW and MANY. OpenBLAS does as well from some hundred rows on.

   Where the processor multiplies bfloat16, two numbers of a row and of a column are one word, and words take the place
   of numbers. */

enum { ACROSS = 2 * LANES, DEPTH = 256, TALL = LANES == 16 ? 12 : 6 };

#ifdef __AVX512F__
#define EACH_HEIGHT(F) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11) F(12)
#else
#define EACH_HEIGHT(F) F(1) F(2) F(3) F(4) F(5) F(6)
#endif
#define tile strip
#ifdef __AVX512BF16__
enum { HAS_PAIRS = 1 };
const int elm_mlx_rounding = 1; /* for who asks whether rows may be rounded */
#define pairs(sum, left, right) \
  (lanes)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)_mm512_set1_ps(left), (__m512bh)(right))
#define TILES_OF(I) STRIP(tile, I, 2) STRIP(pairs, I, 2)
#define TILE_OF(I) [I] = {tile_##I##_2, pairs_##I##_2},
#else
enum { HAS_PAIRS = 0 };
#define TILES_OF(I) STRIP(tile, I, 2)
#define TILE_OF(I) [I] = {tile_##I##_2},
#endif
EACH_HEIGHT(TILES_OF)
static void (*const tiles[][2])(const struct product *, int, int) = {EACH_HEIGHT(TILE_OF)};

/* `there` rows, LANES or fewer, as columns `across` numbers apart; zeros in place of those that are not. */
static void pack(const float *rows, long step, int there, int across, int deep, float *packed) {
  int at = 0;
  for (; there == LANES && at + LANES <= deep; at += LANES) transpose(rows + at, step, packed + at * across, across);
  for (; at < deep; at++)
    for (int i = 0; i < LANES; i++) packed[at * across + i] = i < there ? rows[i * step + at] : 0;
}

/* The same of rows in bfloat16, an even number of numbers, of which a word holds two. */
static void pack_halves(const unsigned char *rows, long step, int there, int across, int deep, float *packed) {
  float turned[LANES * LANES] __attribute__((aligned(64)));
  for (int at = 0; at < deep; at += 2 * LANES) {
    int count = clamp(deep - at, 2 * LANES) / 2;
    pack((const float *)rows + at / 2, step / 4, there, LANES, count, turned);
    for (int i = 0; i < count; i++) {
      words both = *(const words *)(turned + i * LANES);
      *(words *)(packed + (at + 2 * i) * across) = both << 16;
      *(words *)(packed + (at + 2 * i + 1) * across) = both & 0xffff0000;
    }
  }
}

/* Some columns, LANES or fewer, from a number on, so many numbers deep, as `pack` lays them out. */
static void lay_out(const struct product *p, int j, int there, int q, int deep, float *packed) {
  static _Thread_local float wide[LANES * DEPTH] __attribute__((aligned(64)));
  const struct stored *s = p->stored;
  if (!s) {
    pack(p->b + j * p->b_step + q, p->b_step, there, ACROSS, deep, packed);
  } else if (s->type == BFLOAT16 && p->k % 2 == 0) {
    pack_halves(row_of(s, j) + 2 * q, s->row_bytes, there, ACROSS, deep, packed);
  } else {
    widen(s, j, there, q, q + deep, wide, DEPTH);
    pack(wide, DEPTH, there, ACROSS, deep, packed);
  }
}

/* Where the numbers of a column begin, from one on, and how many bytes so many take. */
static inline const unsigned char *column_at(const struct product *p, int j, int q) {
  const struct stored *s = p->stored;
  return s ? row_of(s, j) + s->row_bytes * q / s->columns : (const unsigned char *)(p->b + j * p->b_step + q);
}

static inline long bytes_of(const struct product *p, int count) {
  return p->stored ? p->stored->row_bytes * count / p->stored->columns : 4l * count;
}

static void many_rows(const struct product *p, int from, int to) {
  static _Thread_local float packed[ACROSS * DEPTH] __attribute__((aligned(64)));
  float edge[TALL * ACROSS];
  int heights = (p->m + TALL - 1) / TALL;
  for (int j = from; j < to; j += ACROSS)
    for (int q = 0, deep; q < p->k; q += deep) {
      int count = clamp(to - j, ACROSS);
      deep = clamp(p->k - q, DEPTH);
      for (int line = 0; line < ACROSS; line += LANES)
        lay_out(p, j + line, clamp(count - line, LANES), q, deep, packed + line);
      int last = q + deep == p->k, next = last ? j + ACROSS : j, at = last ? 0 : q + deep;
      long bytes = bytes_of(p, clamp(p->k - at, DEPTH));
      for (int height = 0, i = 0, end; height < heights; height++, i = end) {
        end = (long)p->m * (height + 1) / heights;
        float *c = p->c + i * p->c_step + j;
        int whole = count == ACROSS, rows = end - i;
        struct product part = {rows, ACROSS, deep, 0, p->alpha, q ? 1 : p->beta, p->a + i * p->a_step + q, packed,
                               whole ? c : edge, p->a_step, ACROSS, whole ? p->c_step : ACROSS};
        for (int r = 0; !whole && part.beta != 0 && r < rows; r++)
          memcpy(edge + r * ACROSS, c + r * p->c_step, 4 * count);
        tiles[rows][p->paired](&part, 0, 0);
        for (int r = 0; !whole && r < rows; r++) memcpy(c + r * p->c_step, edge + r * ACROSS, 4 * count);
        for (int line = i * ACROSS / p->m; line < end * ACROSS / p->m; line++) /* of what is read next */
          for (long byte = 0; byte < bytes; byte += 64)
            __builtin_prefetch(column_at(p, next + line, at) + byte, 0, 2);
      }
    }
}

static int is_paired(const struct product *p) {
  return HAS_PAIRS && p->m > FEW && p->stored && p->stored->rounding && p->k % 2 == 0;
}

#ifdef __AVX512BF16__
static void pair_rows(const void *what, int from, int to) {
  const struct product *p = what;
  float *pairs = (float *)p->b;
  for (int i = from; i < to; i++) {
    const float *row = p->a + i * p->a_step;
    int at = 0;
    for (; at + 2 * LANES <= p->k; at += 2 * LANES)
      *(lanes *)(pairs + i * p->b_step + at / 2) =
          (lanes)_mm512_cvtne2ps_pbh(*(const __m512_u *)(row + at + LANES), *(const __m512_u *)(row + at));
    if (at < p->k) {
      float rest[2 * LANES] = {0};
      memcpy(rest, row + at, 4 * (p->k - at));
      *(lanes *)(pairs + i * p->b_step + at / 2) =
          (lanes)_mm512_cvtne2ps_pbh(*(const __m512_u *)(rest + LANES), *(const __m512_u *)rest);
    }
  }
}
#endif

/* A product with a matrix in bfloat16 and rows rounded to it. */
static struct product paired(const struct product *p) {
  struct product q = *p;
#ifdef __AVX512BF16__
  long step = (p->k + 31) / 32 * 16;
  static _Thread_local struct memory kept;
  q.b = at_least_floats(&kept, step * p->m), q.b_step = step;
  share(pair_rows, &q, p->m, 1, (long)p->m * p->k * 4);
  q.a = q.b, q.a_step = step, q.k = p->k / 2, q.paired = 1, q.stored = 0;
  q.b = (const float *)row_of(p->stored, 0), q.b_step = p->stored->row_bytes / 4;
#endif
  return q;
}
