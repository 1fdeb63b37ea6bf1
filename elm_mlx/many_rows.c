/* Products of many rows, as a prompt has, with a matrix that is transposed, in float32 or as it is stored. Included by
   cblas.c.

   Some columns at a time, as deep as a cache holds them, are widened and laid out so that the same number of all stands
   together; then the sums of `strips` run along them. A row's result has the same bits whatever the number of
   processors, and of rows between FEW and MANY. OpenBLAS does as well from some hundred rows on. */

enum { ACROSS = 2 * LANES, DEPTH = 512 };

/* `there` rows, `across` or fewer, as columns `across` numbers apart; zeros in place of those that are not. */
static void pack(const float *rows, long step, int there, int across, int deep, float *packed) {
  int at = 0, whole = deep / LANES * LANES;
  for (; at + LANES <= there; at += LANES) {
    for (int d = 0; d < whole; d += LANES) transpose(rows + at * step + d, step, packed + d * across + at, across);
    for (int d = whole; d < deep; d++)
      for (int i = at; i < at + LANES; i++) packed[d * across + i] = rows[i * step + d];
  }
  for (; at < across; at++)
    for (int d = 0; d < deep; d++) packed[d * across + at] = at < there ? rows[at * step + d] : 0;
}

static void many_rows(const struct product *p, int from, int to) {
  static _Thread_local float wide[ACROSS * DEPTH] __attribute__((aligned(64)));
  static _Thread_local float packed[ACROSS * DEPTH] __attribute__((aligned(64)));
  for (int j = from; j < to; j += ACROSS)
    for (int q = 0; q < p->k; q += DEPTH) {
      int count = to - j < ACROSS ? to - j : ACROSS, deep = p->k - q < DEPTH ? p->k - q : DEPTH;
      if (p->stored) widen(p->stored, j, count, q, q + deep, wide, DEPTH);
      pack(p->stored ? wide : p->b + j * p->b_step + q, p->stored ? DEPTH : p->b_step, count, ACROSS, deep, packed);
      strips(&(struct product){p->m, count, deep, 0, p->alpha, q ? 1 : p->beta, p->a + q, packed, p->c + j, p->a_step,
                               ACROSS, p->c_step}, 0, count);
    }
}
