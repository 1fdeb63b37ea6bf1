/* Keys or values of a head as a cache has them: float32, or in 8 or 4 bits as model/packed.py says. Included by cblas.c.

   Codes are widened to what packed.py's `unpacked` makes of them, to the bit, and made as MLX's `quantize` makes them,
   so a cache that is written here holds what it would hold anyway. */

#include <math.h>

/* A position after the other: `head_dim` numbers; or codes, and apart from them a scale and a bias for each `group`. Of
   4 bits a byte holds a number of a group's lower half and, above it, the one of its upper half. */
struct cached {
  unsigned char *rows;
  float *scales, *biases;
  int head_dim, bits, group; /* 32 bits: float32, without the others */
};

static long bytes_of_position(const struct cached *x) { return (long)x->head_dim * x->bits / 8; }

/* Fetches numbers that are not read in their order; codes are, and are fetched as they are widened. */
static void fetch_floats(const struct cached *x, long at, int count) {
  long size = bytes_of_position(x);
  for (long i = 0; i < count * size && x->bits == 32; i += 64) __builtin_prefetch(x->rows + at * size + i);
}

/* The same from a position on. */
static struct cached from_position(const struct cached *x, long at) {
  struct cached found = *x;
  found.rows += at * bytes_of_position(x);
  if (x->group) found.scales += at * (x->head_dim / x->group), found.biases += at * (x->head_dim / x->group);
  return found;
}

/* A product and a sum, rounded one after the other as MLX's are. */
INLINE lanes number_of(words code, float scale, float bias) {
  return __builtin_convertvector((integers)code, lanes) * scale + bias;
}

INLINE void widen_positions(const struct cached *x, int bits, long at, int count, float *to) {
  const unsigned char *codes = x->rows + at * bytes_of_position(x);
  long groups = x->head_dim / x->group;
  const float *scale = x->scales + at * groups, *bias = x->biases + at * groups;
  int bytes = x->group * bits / 8;
  for (long end = count * groups; end--; scale++, bias++, codes += bytes, to += x->group) {
    __builtin_prefetch(codes + 4 * AHEAD); /* of the next span, which is of the next positions */
    __builtin_prefetch(scale + AHEAD / 32);
    __builtin_prefetch(bias + AHEAD / 32);
    for (int i = 0; i < bytes; i += LANES) {
      words both = unpack_8(codes + i);
      *(lanes *)(to + i) = number_of(bits == 4 ? both & 15 : both, *scale, *bias);
      if (bits == 4) *(lanes *)(to + bytes + i) = number_of(both >> 4, *scale, *bias);
    }
  }
}

/* Numbers of so many positions from one on: where they are, or widened in `room`. */
static const float *numbers_of(const struct cached *x, long at, int count, float *room) {
  if (x->bits == 32) return (const float *)x->rows + at * x->head_dim;
  if (x->bits == 8)
    widen_positions(x, 8, at, count, room);
  else
    widen_positions(x, 4, at, count, room);
  return room;
}

/* The nearest of the numbers 0 to `most`, as bytes. */
INLINE bytes codes_of(lanes x, float scale, float bias, int most) {
  lanes code = (x - bias) / scale + 12582912.0f - 12582912.0f; /* rounds, as in `exponential` */
  code = where(code < 0, all(0), where(code > (float)most, all(most), code));
  return __builtin_convertvector(__builtin_convertvector(code, integers), bytes);
}

INLINE void quantize_position(const struct cached *x, int bits, const float *numbers) {
  int most = (1 << bits) - 1, bytes_of_group = x->group * bits / 8;
  unsigned char *codes = x->rows;
  for (int group = 0; group < x->head_dim / x->group; group++, numbers += x->group) {
    float lows[LANES], highs[LANES], low = INFINITY, high = -INFINITY;
    *(lanes *)lows = all(low), *(lanes *)highs = all(high);
    for (int i = 0; i < x->group; i += LANES) {
      lanes some = *(const lanes *)(numbers + i);
      *(lanes *)lows = where(some < *(lanes *)lows, some, *(lanes *)lows);
      *(lanes *)highs = where(some > *(lanes *)highs, some, *(lanes *)highs);
    }
    for (int i = 0; i < LANES; i++) {
      low = lows[i] < low ? lows[i] : low;
      high = highs[i] > high ? highs[i] : high;
    }
    int below = fabsf(low) > fabsf(high);
    float scale = (high - low) / most, edge = below ? low : high, bias = 0;
    scale = scale > 1e-7f ? scale : 1e-7f;
    scale = below ? scale : -scale;
    float steps = rintf(edge / scale);
    if (steps != 0) scale = edge / steps, bias = edge;
    for (int i = 0; i < bytes_of_group; i += LANES, codes += LANES) {
      bytes code = codes_of(*(const lanes *)(numbers + i), scale, bias, most);
      if (bits == 4) code |= codes_of(*(const lanes *)(numbers + bytes_of_group + i), scale, bias, most) << 4;
      *(bytes *)codes = code;
    }
    x->scales[group] = scale, x->biases[group] = bias;
  }
}

/* Writes a position. */
static void put_position(const struct cached *x, long at, const float *numbers) {
  struct cached to = from_position(x, at);
  switch (x->bits) {
    case 8: quantize_position(&to, 8, numbers); break;
    case 4: quantize_position(&to, 4, numbers); break;
    default: memcpy(to.rows, numbers, 4 * x->head_dim);
  }
}
