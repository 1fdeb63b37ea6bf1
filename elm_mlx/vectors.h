/* Vectors of float32, as wide as the processor's registers, by the extension that GCC and Clang share. Included by
   cblas.c. */

#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int integers __attribute__((vector_size(4 * LANES), aligned(4)));

/* Has what was read once stay in a register: GCC would have each multiplication read it again, and of rows that lie
   across lines of the cache, as MLX's do, reading them three times takes longer than all the rest. */
#ifdef __AVX512F__
#define IN_REGISTER(x) __asm__("" : "+v"(x))
#elif defined(__AVX__)
#define IN_REGISTER(x) __asm__("" : "+x"(x))
#else
#define IN_REGISTER(x)
#endif

static inline float total(const lanes *numbers) {
  float x[LANES];
  *(lanes *)x = *numbers;
  for (int i = 0; i < LANES / 2; i++) x[i] += x[i + LANES / 2];
  for (int i = 0; i < LANES / 4; i++) x[i] += x[i + LANES / 4];
  for (int i = 0; i < LANES / 8; i++) x[i] += x[i + LANES / 8];
  return LANES == 16 ? x[0] + x[1] : x[0];
}

static inline lanes at_least(lanes x, float least) { /* what is no number stays none */
  integers less = x < least;
  return (lanes)(((integers)((lanes){0} + least) & less) | ((integers)x & ~less));
}

/* exp(x) of x in [-87, 87], to 3e-7 of its value near 0: 2 to the nearest whole power, and a polynomial of the rest. */
static inline lanes exponential(lanes x) {
  const float rounder = 12582912; /* 1.5 * 2^23: adding it rounds */
  x *= 1.44269504f;
  lanes up = x + rounder, rest = x - (up - rounder);
  lanes power = rest * 0.0013266970f + 0.009675460f;
  power = power * rest + 0.055507425f;
  power = power * rest + 0.24022122f;
  power = power * rest + 0.69314694f;
  power = power * rest + 1.0000001f;
  return power * (lanes)(((integers)up - 0x4B400000 + 127) << 23);
}
