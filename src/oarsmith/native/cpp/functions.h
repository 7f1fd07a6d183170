// exp and tanh of sixteen numbers. Included by vec.h.
#pragma once

// Relative error below 3e-7 on [-87, 88], 0 below, that of 88 above; NaN stays. Cody-Waite reduction and a polynomial
// of degree 6 (Cephes).
static ALWAYS_INLINE vec16 exp16(const vec16& x) {
  vec16 clipped = min16(max16(x, all16(-87.0f)), all16(88.0f));
  vec16 t = clipped * 1.44269504088896341f;
  ivec16 n = round16(t);
  vec16 whole = convert16<float>(n);
  vec16 r = clipped - whole * 0.693359375f;
  r = r + whole * 2.12194440e-4f;
  vec16 p = fma16(all16(1.9875691500e-4f), r, all16(1.3981999507e-3f));
  p = fma16(p, r, all16(8.3334519073e-3f));
  p = fma16(p, r, all16(4.1665795894e-2f));
  p = fma16(p, r, all16(1.6666665459e-1f));
  p = fma16(p, r, all16(5.0000001201e-1f));
  p = fma16(p * r, r, r) + 1.0f;
  vec16 power = bits16<float>(by_part<ivec16>([](auto e) { return (e + 127) << 23; }, n));
  return where16(x < all16(-87.0f), zero16(), p * power);
}

// Absolute error below 3e-7; NaN stays.
static ALWAYS_INLINE vec16 tanh16(const vec16& x) {
  vec16 clipped = min16(max16(x, all16(-15.0f)), all16(15.0f));
  vec16 e = exp16(clipped * 2.0f);
  return (e - 1.0f) / (e + 1.0f);
}
