/* Vectors of float32, as wide as the processor's registers, by the extension that GCC and Clang share. Included by
   cblas.c. */

#include <string.h>
#if defined __AVX2__ || defined __F16C__ || defined __FMA__
#include <immintrin.h>
#elif defined __aarch64__
#include <arm_neon.h>
#endif

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int integers __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float four __attribute__((vector_size(16)));

/* Has what was read once stay in a register: GCC would have each multiplication read it again, and of rows that lie
   across lines of the cache, as MLX's do, reading them three times takes longer than all the rest. */
#ifdef __AVX512F__
#define IN_REGISTER(x) __asm__("" : "+v"(x))
#elif defined(__AVX__)
#define IN_REGISTER(x) __asm__("" : "+x"(x))
#else
#define IN_REGISTER(x)
#endif

/* Some of a vector's numbers, by their places. */
#if defined __clang__ || __GNUC__ >= 12
#define PART(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
typedef float eight __attribute__((vector_size(32)));

/* The sum of all: halves are added, and their halves again. */
static inline float total(const lanes *numbers) {
  lanes x = *numbers;
#ifdef __AVX512F__
  eight y = PART(x, 0, 1, 2, 3, 4, 5, 6, 7) + PART(x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  lanes y = x;
#endif
  four z = PART(y, 0, 1, 2, 3) + PART(y, 4, 5, 6, 7);
  z += PART(z, 2, 3, 2, 3);
  return z[0] + z[1];
}
#else
static inline float total(const lanes *numbers) {
  float x[LANES];
  *(lanes *)x = *numbers;
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) x[i] += x[i + width];
  return x[0];
}
#endif

static inline lanes all(float x) { return x - (lanes){0}; }

/* x * y + sum, rounded once where the processor can do it. Asked for by name, and all else rounded twice (blas.py): left
   to itself a compiler makes one operation of a product and a sum here and two there, and GCC for most processors with
   AVX2 two wherever a sum waits for the one before, so that the same row would have other bits in another tile. */
static inline lanes fused(lanes x, lanes y, lanes sum) {
#if defined __AVX512F__
  return (lanes)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
#elif defined __FMA__
  return (lanes)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#elif defined __aarch64__
  const four *left = (four *)&x, *right = (four *)&y;
  four *to = (four *)&sum;
  to[0] = vfmaq_f32(to[0], left[0], right[0]);
  to[1] = vfmaq_f32(to[1], left[1], right[1]);
  return sum;
#else
  return x * y + sum;
#endif
}

static inline lanes where(integers condition, lanes x, lanes y) {
  return (lanes)((condition & (integers)x) | (~condition & (integers)y));
}

static inline lanes at_least(lanes x, float least) { /* what is no number stays none */
  return where(x < least, all(least), x);
}

/* exp(x) of x in [-87, 87], to 1e-7 of it (3e-6 where products are rounded), and 1 of 0. log2(e) is two numbers, for what
   is left of its product with 87 is small. 2**f for f in [-1/2, 1/2] is a polynomial, that of the least relative error of
   those that are 1 at 0; adding 1.5 * 2**23 rounds to a whole number, in the last bits. */
static inline lanes exponential(lanes x) {
  lanes whole = fused(x, all(1.44269504f), all(12582912.0f));
  lanes part = fused(x, all(1.9259630e-8f), fused(x, all(1.44269504f), 12582912.0f - whole));
  lanes power = fused(part, all(1.5353360504e-4f), all(1.3398875017e-3f));
  power = fused(power, part, all(9.6184369177e-3f));
  power = fused(power, part, all(5.5503323674e-2f));
  power = fused(power, part, all(2.4022647738e-1f));
  power = fused(power, part, all(6.9314718246e-1f));
  power = fused(power, part, all(1.0f));
  return power * (lanes)(((integers)whole + 127) << 23);
}

/* Numbers of two vectors by turns: those of the lower halves, of the upper ones. */
#ifdef __AVX512F__
#define LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
#define LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define UPPER 4, 12, 5, 13, 6, 14, 7, 15
#endif
#if defined __clang__ || __GNUC__ >= 12
#define BY_TURNS(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define BY_TURNS(x, y, ...) __builtin_shuffle(x, y, (integers){__VA_ARGS__})
#endif

/* Columns of LANES rows become rows, `step` numbers from the next: a row and the one half of all farther by turns, as
   often as LANES can be halved. */
static inline void transpose(const float *rows, long row_step, float *columns, long step) {
  lanes x[LANES], y[LANES];
  for (int i = 0; i < LANES; i++) x[i] = *(const lanes *)(rows + i * row_step);
  for (int halved = 1; halved < LANES; halved *= 2) {
    for (int i = 0; i < LANES / 2; i++) {
      y[2 * i] = BY_TURNS(x[i], x[i + LANES / 2], LOWER);
      y[2 * i + 1] = BY_TURNS(x[i], x[i + LANES / 2], UPPER);
    }
    for (int i = 0; i < LANES; i++) x[i] = y[i];
  }
  for (int i = 0; i < LANES; i++) *(lanes *)(columns + i * step) = x[i];
}
