// master = keep * master - delta in one pass: fp32 parameters and bf16 ones with the lower half of their master.
#include "common.h"

extern "C" void subtract_f32(float* p, int16_t*, const float* delta, int64_t n, float keep) {
#pragma omp parallel for simd schedule(static) if (n > SERIAL)
  for (int64_t i = 0; i < n; ++i) p[i] = p[i] * keep - delta[i];
}

extern "C" void subtract_bf16(bf16* p, int16_t* low, const float* delta, int64_t n, float keep) {
#pragma omp parallel for simd schedule(static) if (n > SERIAL)
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = (static_cast<uint32_t>(p[i].bits) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low[i]));
    float master;
    std::memcpy(&master, &bits, 4);
    master = master * keep - delta[i];
    std::memcpy(&bits, &master, 4);
    p[i].bits = static_cast<uint16_t>((bits + 0x8000u) >> 16);
    low[i] = static_cast<int16_t>(static_cast<uint16_t>(bits));
  }
}
