/* CBLAS as MLX calls it: products of few rows here, a prompt's in many_rows.c, the others by the OpenBLAS of
   scipy-openblas32, whose names carry a prefix. Compiled by blas.py.

   OpenBLAS packs the matrix for every product. For one row, or a few, that takes longer than reading the matrix
   once, which is all that has to be done: decoding is made of such products, a row for each text. Here they are
   scalar products along the rows of both sides, a few at a time, so that each number is read once from memory; of a
   matrix that is not transposed, sums of its rows. Each is summed in the same order whatever the number of rows and
   threads, and whatever zeros follow, so a text's logits don't depend on its company.

   Processors take a few columns at a time, each from a stretch of its own and then from the others': on a machine that
   others use too, none waits for one that is held up, but for the columns that it has in hand. */

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>

#include "vectors.h"

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112, CONJ_TRANS = 113 };
enum { MOST = LANES == 16 ? 8 : 4 }; /* rows whose sums with three columns all have registers */
#ifdef __FMA__
enum { OWN_MANY = 1 };
const int elm_mlx_many_rows = 1; /* for who asks whether they are computed here */
#else /* vectors narrower than those of OpenBLAS, which finds out what the processor has; or, with NEON, not measured */
enum { OWN_MANY = 0 };
#endif
enum { FEW = 16, MANY = 512, WORTH_SHARING = 1 << 18, SPINS = 1 << 13, SHORT = 1 << 10, PORTIONS = 16, MOST_THREADS = 64 };

void scipy_cblas_sgemm(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *,
                       int);
void scipy_cblas_dgemm(int, int, int, int, int, int, double, const double *, int, const double *, int, double, double *,
                       int);
void scipy_cblas_cgemm(int, int, int, int, int, int, const void *, const void *, int, const void *, int, const void *,
                       void *, int);
void scipy_cblas_sgemv(int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
int scipy_openblas_get_num_threads(void);
void scipy_openblas_set_num_threads(int);

/* What is multiplied: c[i][j] = alpha * a[i] . b[j] + beta * c[i][j], of m rows a and n columns b, k long, which are
   the rows of a matrix that is transposed. */
struct product {
  int m, n, k, transposed;
  float alpha, beta;
  const float *a, *b;
  float *c;
  long a_step, b_step, c_step;
  const struct stored *stored; /* b, where that is not float32 */
  int paired;                  /* numbers are pairs of bfloat16, in many_rows.c */
};

/* Processors that a product uses, under OpenBLAS's names for it. OpenBLAS itself has one of them: its threads wait for
   work on processors that helpers here need. */
static atomic_int processors;
int openblas_get_num_threads(void) { return processors; }
void openblas_set_num_threads(int count) { processors = count; }

/* A sum and the products that are left, fewer than LANES. */
static float with_rest(float sum, const float *a, const float *b, int count) {
  for (int q = 0; q < count; q++) sum += a[q] * b[q];
  return sum;
}

/* The sum down a column, as a strip's: so of vectors, of which one number counts. */
static float down(const float *a, const float *b, long step, int count) {
  lanes sum = {0};
  for (int q = 0; q < count; q++) sum = fused(all(a[q]), all(b[q * step]), sum);
  return sum[0];
}

static int clamp(int x, int most) { return x < 0 ? 0 : x < most ? x : most; }

static inline void put(const struct product *p, int i, int j, float sum) {
  float *c = p->c + i * p->c_step + j;
  *c = p->beta == 0 ? p->alpha * sum : p->alpha * sum + p->beta * *c;
}

/* Running sums of I rows with J columns or vectors of them. Each is begun by itself: an array of zeros is written to memory
   by GCC, with an instruction that takes longer than some columns. */
#define SUMS(I, J)            \
  lanes sums[I][J];           \
  for (int i = 0; i < I; i++) \
    for (int j = 0; j < J; j++) sums[i][j] = (lanes){0};

/* Scalar products of I rows with J: as many running sums as registers hold. */
#define TILE(I, J)                                                                                                  \
  static void tile_##I##_##J(const struct product *p, int i0, int j0) {                                             \
    const float *a = p->a + i0 * p->a_step, *b = p->b + j0 * p->b_step;                                             \
    SUMS(I, J)                                                                                                      \
    int at = 0;                                                                                                     \
    for (; at + LANES <= p->k; at += LANES) {                                                                       \
      lanes right[J];                                                                                               \
      for (int j = 0; j < J; j++) {                                                                                 \
        right[j] = *(const lanes *)(b + j * p->b_step + at);                                                        \
        IN_REGISTER(right[j]);                                                                                      \
      }                                                                                                             \
      for (int j = 0; j < J; j++) __builtin_prefetch(b + (J + j) * p->b_step + at); /* the next tile's */           \
      for (int i = 0; i < I; i++) {                                                                                 \
        lanes left = *(const lanes *)(a + i * p->a_step + at);                                                      \
        IN_REGISTER(left);                                                                                          \
        for (int j = 0; j < J; j++) sums[i][j] = fused(left, right[j], sums[i][j]);                                 \
      }                                                                                                             \
    }                                                                                                               \
    for (int i = 0; i < I; i++)                                                                                     \
      for (int j = 0; j < J; j++)                                                                                   \
        put(p, i0 + i, j0 + j,                                                                                      \
            with_rest(total(&sums[i][j]), a + i * p->a_step + at, b + j * p->b_step + at, p->k - at));              \
  }
TILE(8, 3)
TILE(7, 3)
TILE(6, 3)
TILE(5, 3)
TILE(4, 3)
TILE(3, 3)
TILE(2, 3)
TILE(1, 3)
TILE(1, 1)

/* Sums of I rows for J * LANES columns of a matrix that is not transposed: they run along its rows, in their order. */
#define strip(sum, left, right) fused(all(left), right, sum)
#define STRIP(ADD, I, J)                                                                                            \
  static void ADD##_##I##_##J(const struct product *p, int i0, int j0) {                                            \
    SUMS(I, J)                                                                                                      \
    for (int q = 0; q < p->k; q++) {                                                                                \
      const float *b = p->b + q * p->b_step + j0;                                                                   \
      for (int i = 0; i < I; i++) {                                                                                 \
        float left = p->a[(i0 + i) * p->a_step + q];                                                                \
        for (int j = 0; j < J; j++) sums[i][j] = ADD(sums[i][j], left, *(const lanes *)(b + j * LANES));            \
      }                                                                                                             \
    }                                                                                                               \
    for (int i = 0; i < I; i++)                                                                                     \
      for (int j = 0; j < J; j++) {                                                                                 \
        lanes *c = (lanes *)(p->c + (i0 + i) * p->c_step + j0 + j * LANES);                                         \
        *c = p->beta == 0 ? p->alpha * sums[i][j] : p->alpha * sums[i][j] + p->beta * *c;                           \
      }                                                                                                             \
  }
STRIP(strip, 6, 4)
STRIP(strip, 6, 2)
STRIP(strip, 6, 1)
STRIP(strip, 3, 4)
STRIP(strip, 3, 1)
STRIP(strip, 2, 4)
STRIP(strip, 2, 1)
STRIP(strip, 1, 8)
STRIP(strip, 1, 1)

#define ROWS(I, J)                                                                                                  \
  for (; j + J * LANES <= to; j += J * LANES) strip_##I##_##J(p, i, j);                                             \
  for (; j + LANES <= to; j += LANES) strip_##I##_1(p, i, j);                                                       \
  break;

static void strips(const struct product *p, int from, int to) {
  for (int i = 0, rows; i < p->m; i += rows) {
    int j = from;
    switch (rows = p->m - i >= 6 ? 6 : p->m - i == 4 ? 2 : p->m - i) {
      case 1: ROWS(1, 8)
      case 2: ROWS(2, 4)
      case 6:
        if (LANES == 16) { ROWS(6, 4) }
        ROWS(6, 2)
      default: rows = 3; ROWS(3, 4)
    }
    if (j < to && to - from >= LANES && p->beta == 0) { /* some are computed again, to the same bits */
      switch (rows) {
        case 1: strip_1_1(p, i, to - LANES); break;
        case 2: strip_2_1(p, i, to - LANES); break;
        case 3: strip_3_1(p, i, to - LANES); break;
        default: strip_6_1(p, i, to - LANES);
      }
      continue;
    }
    for (; j < to; j++)
      for (int r = i; r < i + rows; r++) put(p, r, j, down(p->a + r * p->a_step, p->b + j, p->b_step, p->k));
  }
}

static void stored_columns(const struct product *p, int from, int to);
static void many_rows(const struct product *p, int from, int to);

static void columns(const struct product *p, int from, int to) {
  if (p->transposed && p->m > FEW) {
    many_rows(p, from, to);
    return;
  }
  if (p->stored) {
    stored_columns(p, from, to);
    return;
  }
  if (!p->transposed) {
    strips(p, from, to);
    return;
  }
  int j = from;
  for (; j + 3 <= to; j += 3)
    for (int i = 0, rows; i < p->m; i += rows) {
      int most = p->m - i < MOST ? p->m - i : MOST;
      switch (rows = most) {
        case 1: tile_1_3(p, i, j); break;
        case 2: tile_2_3(p, i, j); break;
        case 3: tile_3_3(p, i, j); break;
        case 4: tile_4_3(p, i, j); break;
        case 5: tile_5_3(p, i, j); break;
        case 6: tile_6_3(p, i, j); break;
        case 7: tile_7_3(p, i, j); break;
        default: tile_8_3(p, i, j);
      }
    }
  for (; j < to; j++)
    for (int i = 0; i < p->m; i++) tile_1_1(p, i, j);
}

/* What stands where MLX takes a matrix to begin, if that is none but something else to compute from the rows. The mark is
   drawn by each process, so that no file can hold it. */
struct description {
  unsigned char mark[32];
  int kind;
};
enum { RETIRED, READ, WRITE, FEED, CHOOSE, STORED, STEP, ORDER };
unsigned char elm_mlx_mark[32];

__attribute__((constructor)) static void draw_mark(void) {
  if (getrandom(elm_mlx_mark, sizeof elm_mlx_mark, 0) != sizeof elm_mlx_mark) abort();
}

static int is_described(const float *b, int n, int k) {
  return (long)n * k * 4 >= (long)sizeof(struct description) && !memcmp(b, elm_mlx_mark, sizeof elm_mlx_mark);
}

/* Memory that is kept for the next time. */
struct memory {
  float *kept;
  size_t size;
};
static float *at_least_floats(struct memory *m, size_t floats) {
  if (floats > m->size) {
    free(m->kept);
    m->kept = aligned_alloc(64, (4 * floats + 63) / 64 * 64);
    if (!m->kept) { /* MLX could not be told */
      perror("elm-mlx: a product's memory");
      abort();
    }
    m->size = floats;
  }
  return m->kept;
}

#include "stored.c"

static const struct stored *stored_at(const float *b, int n, int k) {
  const struct description *found = (const void *)b;
  return is_described(b, n, k) && found->kind == STORED ? (const void *)b : 0;
}

/* One job at a time is shared out: n columns, of which a call computes some. Each thread has a stretch of portions, and
   goes through it from the first on, so that what it fetches ahead is what it takes next; then it helps the others.
   Who takes a portion says when it is done. `left` is what is left of a stretch: at most 0 when there is nothing, and
   then `shared` belongs to who holds `sharing`. */
typedef void (*compute)(const void *what, int from, int to);
static struct {
  compute columns;
  const void *what;
  int n, portion;
} shared;
static struct stretch {
  atomic_int left;
  int end; /* of its portions, by their numbers */
} __attribute__((aligned(64))) stretches[MOST_THREADS];
static atomic_int threads_at_work, done, sleeping;
static atomic_uint jobs; /* that have been shared out */
static pthread_mutex_t sharing = PTHREAD_MUTEX_INITIALIZER, resting = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t called = PTHREAD_COND_INITIALIZER;
static pthread_rwlock_t living = PTHREAD_RWLOCK_INITIALIZER; /* written by who frees what others may be reading */
static int helpers;

static void work(int thread) {
  for (int i = 0, threads = atomic_load(&threads_at_work); i < threads; i++) {
    struct stretch *own = &stretches[(thread + i) % threads];
    for (int number; (number = atomic_fetch_sub(&own->left, 1) - 1) >= 0;) {
      int from = (own->end - 1 - number) * shared.portion, to = from + shared.portion;
      shared.columns(shared.what, from, to < shared.n ? to : shared.n);
      atomic_fetch_add(&done, 1);
    }
  }
}

/* Waits a moment for another thread: at first without giving the processor away, for that takes longer than most. */
static inline void pause_for(int spins) {
  if (spins >= SHORT)
    sched_yield();
  else
#if defined __x86_64__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("isb");
#else
    atomic_signal_fence(memory_order_seq_cst);
#endif
}

static void *help(void *which) {
  for (unsigned seen = 0;;) {
    for (int spins = 0; spins < SPINS && atomic_load(&jobs) == seen; spins++) pause_for(spins);
    if (atomic_load(&jobs) == seen) {
      pthread_mutex_lock(&resting);
      atomic_fetch_add(&sleeping, 1);
      while (atomic_load(&jobs) == seen) pthread_cond_wait(&called, &resting);
      atomic_fetch_sub(&sleeping, 1);
      pthread_mutex_unlock(&resting);
    }
    seen = atomic_load(&jobs);
    work((intptr_t)which);
  }
  return 0;
}

static void after_fork(void) { /* a forked process has no helpers, and nobody computes there */
  helpers = 0;
  atomic_store(&sleeping, 0);
  for (int i = 0; i < MOST_THREADS; i++) atomic_store(&stretches[i].left, 0);
  pthread_mutex_init(&sharing, 0);
  pthread_mutex_init(&resting, 0);
  pthread_cond_init(&called, 0);
  pthread_rwlock_init(&living, 0);
}

static void find_helpers(int wanted) {
  if (helpers >= wanted) return;
  sigset_t all, kept;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &kept); /* signals are the caller's */
  for (pthread_t helper; helpers < wanted; helpers++) {
    if (pthread_create(&helper, 0, help, (void *)(intptr_t)(helpers + 1))) break;
    pthread_detach(helper);
  }
  pthread_sigmask(SIG_SETMASK, &kept, 0);
}

__attribute__((constructor)) static void prepare(void) {
  pthread_atfork(0, 0, after_fork);
  processors = scipy_openblas_get_num_threads();
  scipy_openblas_set_num_threads(1);
}

/* Computes n columns, with helpers where `multiplications` are worth it; no portion cuts `together` of them. */
static void share(compute part, const void *what, int n, int together, long multiplications) {
  int threads = processors < MOST_THREADS ? processors : MOST_THREADS;
  if (threads < 2 || multiplications < WORTH_SHARING || pthread_mutex_trylock(&sharing)) {
    part(what, 0, n);
    return;
  }
  find_helpers(threads - 1);
  int portion = (n / (threads * PORTIONS) / together + 1) * together, portions = (n + portion - 1) / portion;
  shared.columns = part, shared.what = what, shared.n = n, shared.portion = portion;
  atomic_store(&done, 0);
  atomic_store(&threads_at_work, threads);
  for (int i = 0, start = 0; i < threads; start = stretches[i++].end) {
    stretches[i].end = (long)portions * (i + 1) / threads;
    atomic_store(&stretches[i].left, stretches[i].end - start);
  }
  atomic_fetch_add(&jobs, 1);
  if (atomic_load(&sleeping)) {
    pthread_mutex_lock(&resting);
    pthread_cond_broadcast(&called);
    pthread_mutex_unlock(&resting);
  }
  work(0);
  for (int spins = 0; atomic_load(&done) < portions; spins += spins < SHORT) pause_for(spins);
  pthread_mutex_unlock(&sharing);
}

#include "many_rows.c"

static void product_columns(const void *p, int from, int to) { columns(p, from, to); }

/* Columns of so many rows that are computed together, of a matrix that is transposed. */
static int together(int m) { return m > FEW ? ACROSS : TOGETHER; }

static void share_product(const struct product *p) {
  struct product q = *p;
  if (is_paired(p)) q = paired(p);
  share(product_columns, &q, p->n, p->transposed ? together(p->m) : 8 * LANES, (long)p->m * p->n * p->k);
}

#include "cached_heads.c"
#include "attention.c"
#include "sublayers.c"

/* A product by OpenBLAS, of which processors compute some rows, or columns, each. */
struct call {
  int ta, tb, m, n, k;
  float alpha, beta;
  const float *a, *b;
  float *c;
  long a_step, b_step, c_step;
};

static void call_rows(const void *what, int from, int to) {
  const struct call *x = what;
  scipy_cblas_sgemm(ROW_MAJOR, x->ta, x->tb, to - from, x->n, x->k, x->alpha,
                    x->a + from * (x->ta == TRANS ? 1 : x->a_step), x->a_step, x->b, x->b_step, x->beta,
                    x->c + from * x->c_step, x->c_step);
}

static void call_columns(const void *what, int from, int to) {
  const struct call *x = what;
  scipy_cblas_sgemm(ROW_MAJOR, x->ta, x->tb, x->m, to - from, x->k, x->alpha, x->a, x->a_step,
                    x->b + from * (x->tb == TRANS ? x->b_step : 1), x->b_step, x->beta, x->c + from, x->c_step);
}

static void share_call(const struct call *x) {
  int longer = x->m > x->n ? x->m : x->n, portion = (longer / (2 * processors) / LANES + 1) * LANES;
  share(x->m > x->n ? call_rows : call_columns, x, longer, portion, (long)x->m * x->n * x->k);
}

/* Rows of a stored matrix from one on, to be widened into float32. */
struct panel {
  const struct stored *s;
  float *to;
  int row;
};

static void widen_panel(const void *what, int from, int to) {
  const struct panel *p = what;
  widen(p->s, p->row + from, to - from, 0, p->s->columns, p->to + (long)from * p->s->columns, p->s->columns);
}

/* Products of other forms with a stored matrix, such as a gradient's: with some of the matrix at a time, widened into
   memory that stays in the last cache. */
static void by_panels(struct call x, const struct stored *stored) {
  int rows = x.tb == TRANS ? x.n : x.k, step = stored->columns, most = PANEL / step < 64 ? 64 : PANEL / step;
  float *wide = scratch((size_t)(most < rows ? most : rows) * step);
  for (int j = 0, count; j < rows; j += count) {
    count = rows - j < most ? rows - j : most;
    share(widen_panel, &(struct panel){stored, wide, j}, count, TOGETHER, (long)count * step * 4);
    struct call some = x;
    some.b = wide, some.b_step = step;
    if (x.tb == TRANS)
      some.n = count, some.c += j;
    else
      some.k = count, some.a += j * (x.ta == TRANS ? x.a_step : 1), some.beta = j ? 1 : x.beta;
    share_call(&some);
  }
}

void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
  ta = ta == CONJ_TRANS ? TRANS : ta, tb = tb == CONJ_TRANS ? TRANS : tb; /* of numbers that are real */
  int some = order == ROW_MAJOR && m > 0 && n > 0 && k > 0;
  const struct stored *stored = some ? stored_at(b, n, k) : 0;
  struct product p = {m, n, k, tb == TRANS, alpha, beta, a, b, c, lda, ldb, ldc, stored};
  struct call other = {ta, tb, m, n, k, alpha, beta, a, b, c, lda, ldb, ldc};
  int rows = ta == NO_TRANS || (m == 1 && lda == 1); /* MLX may call a row a column */
  if (some && is_attention(alpha)) {
    attend(m, beta, a, b, c);
  } else if (stored && rows && tb == TRANS && (m <= FEW || OWN_MANY)) {
    share_product(&p);
  } else if (stored) {
    by_panels(other, stored);
  } else if (some && is_described(b, n, k) && tb != TRANS) { /* a derivative, which there is none of */
    for (int i = 0; i < m; i++)
      for (int j = 0; j < n; j++) c[(long)i * ldc + j] = NAN;
  } else if (some && is_described(b, n, k)) {
    sublayer((const struct sublayer *)b, m, n, k, a, lda, c, ldc);
  } else if (some && rows && (m <= FEW || (OWN_MANY && m < MANY && tb == TRANS))) {
    share_product(&p);
  } else if (some && m == 1) { /* a row times a matrix is the matrix, transposed, times a column */
    int step = ta == NO_TRANS ? 1 : lda;
    scipy_cblas_sgemv(order, tb == NO_TRANS ? TRANS : NO_TRANS, tb == NO_TRANS ? k : n, tb == NO_TRANS ? n : k, alpha,
                      b, ldb, a, step, beta, c, 1);
  } else if (some && n == 1) {
    int step = tb == NO_TRANS ? ldb : 1;
    scipy_cblas_sgemv(order, ta, ta == NO_TRANS ? m : k, ta == NO_TRANS ? k : m, alpha, a, lda, b, step, beta, c, ldc);
  } else if (some) {
    share_call(&other);
  } else {
    scipy_cblas_sgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
}

void cblas_dgemm(int order, int ta, int tb, int m, int n, int k, double alpha, const double *a, int lda,
                 const double *b, int ldb, double beta, double *c, int ldc) {
  scipy_openblas_set_num_threads(processors);
  scipy_cblas_dgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  scipy_openblas_set_num_threads(1);
}
void cblas_cgemm(int order, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int lda,
                 const void *b, int ldb, const void *beta, void *c, int ldc) {
  scipy_openblas_set_num_threads(processors);
  scipy_cblas_cgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  scipy_openblas_set_num_threads(1);
}
