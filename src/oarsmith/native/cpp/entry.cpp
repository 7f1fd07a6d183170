// The step as Python calls it. No exception leaves: what fails for want of memory gives null or 1.
#include "step.h"

extern "C" {

void* native_step_new(const StepSpec* spec) {
  try {
    return new Step(*spec);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void native_step_free(void* step) { delete static_cast<Step*>(step); }

// sets: [rotations, rows].
int native_step_run(void* step, const StepRows* rows, const int32_t* sets) {
  try {
    static_cast<Step*>(step)->run(*rows, sets);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

int native_step_logits(void* step, int64_t count, const int64_t* places, float* out) {
  try {
    static_cast<Step*>(step)->logits(count, places, out);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

int native_step_sample(void* step, int64_t count, SampleRow* rows) {
  try {
    static_cast<Step*>(step)->sample(rows, count);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

void native_step_copy_page(void* step, int64_t source, int64_t target) {
  static_cast<Step*>(step)->cache().copy_page(source, target);
}

void native_step_copy_states(void* step, int64_t source, int64_t target) {
  static_cast<Step*>(step)->copy_states(source, target);
}

// The sizes of the structs that Python writes, in the order of program.h, to be compared with its own.
void native_struct_sizes(int64_t* sizes) {
  const int64_t found[] = {sizeof(Norm), sizeof(Attention), sizeof(Experts), sizeof(Matrix), sizeof(Operation),
                           sizeof(RotationSpec), sizeof(StepSpec), sizeof(StepRows), sizeof(SampleRow)};
  std::memcpy(sizes, found, sizeof(found));
}
}
