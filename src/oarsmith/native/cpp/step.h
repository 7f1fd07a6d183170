// Runs a program for a step's rows: every member of the team does its share of each operation, then they meet.
#pragma once
#include <memory>

#include "attention_block.h"
#include "multiply.h"
#include "pack.h"
#include "program.h"
#include "sample.h"
#include "threads.h"

class Step {
 public:
  explicit Step(const StepSpec& spec);

  // Brings the rows into the cache and keeps their hidden states. `sets`: [rotations, rows].
  void run(const StepRows& rows, const int32_t* sets);
  // Logits [places, vocabulary] of rows of the last run.
  void logits(int64_t count, const int64_t* places, float* out);

  // Tokens of rows of logits of this vocabulary.
  void sample(SampleRow* rows, int64_t count);

  const Cache& cache() const { return cache_; }
  // Let slot `target` go on from where `source` is.
  void copy_states(int64_t source, int64_t target);

 private:
  // What a member has for itself.
  struct Member {
    std::vector<float> row;
    AttentionScratch attention;
    Sampler sampler;
  };
  // A share [first, stop) of `count` for a member.
  struct Share {
    Share(int64_t count, int64_t member, int64_t of) : first(count * member / of), stop(count * (member + 1) / of) {}
    int64_t first, stop;
  };

  void some_rows(const StepRows& rows, const int32_t* const* sets);
  void begin_inputs(int64_t rows);
  void find_blocks(const StepRows& rows);
  void operations(const Operation* list, int64_t count, int64_t rows, int member);
  void turn(const StepRows& rows, const int32_t* const* sets, int member);
  void embed(const Operation& op, int64_t rows, int member);
  void norm(const Operation& op, int64_t rows, int member);
  void linear(const Operation& op, int64_t rows, int member);
  void attend(const Operation& op, int64_t rows, int member);
  void place(const Operation& op, int64_t rows, int member);
  void place_head(const Attention& spec, float* qkv, int64_t row, int64_t head, bool with_norm);
  void heads(const Operation& op, int64_t rows, int member);
  void join(const Operation& op, int64_t rows, int member);
  void experts(const Operation& op, int64_t rows, int member);
  void choose(const Operation& op, int64_t row);
  void sort_by_expert(const Experts& spec, int64_t rows);
  template <class Source>
  const Inputs& prepare(const Matrix& matrix, const Norm& norm, int64_t rows, int member, Source&& source);
  template <Stored S>
  void attend_blocks(const Operation& op, int member);

  std::vector<Inputs>& inputs_for(const Matrix& matrix, bool each_all = false);

  StepSpec spec_;
  std::vector<Operation> body_, head_;
  std::vector<RotationSpec> rotation_specs_;
  std::vector<int64_t> state_widths_;
  Cache cache_;
  Memory memory_, hidden_;
  int64_t hidden_rows_ = 0;
  std::vector<Buffer> buffers_;
  std::vector<Rotation> rotations_;
  // For each format and number of columns, the inputs that all members share (the first), or each its own.
  struct InputsOf {
    Format format;
    int64_t columns;
    bool each_all;  // every member has room for all rows
    std::vector<Inputs> inputs;
  };
  std::vector<InputsOf> inputs_;
  std::vector<Member> members_;
  const StepRows* rows_ = nullptr;
  std::vector<RowBlock> blocks_;
  // Of a step's rows: the experts each chose, and their weights; these choices sorted by expert, and where each begins.
  std::vector<int32_t> chosen_, order_, starts_;
  std::vector<float> shares_;
  std::vector<std::vector<float>> states_;  // [states]: [slots, width]
  Team team_;
};

// The inputs of a product, from rows that source(row) gives. One row is prepared by every member for itself: that is
// faster than to wait for one of them.
template <class Source>
const Inputs& Step::prepare(const Matrix& matrix, const Norm& norm, int64_t rows, int member, Source&& source) {
  std::vector<Inputs>& all = inputs_for(matrix);
  Inputs& inputs = all[rows == 1 ? member : 0];
  const Share share = rows == 1 ? Share(1, 0, 1) : Share(rows, member, team_.size());
  float* normed = members_[member].row.data();
  for (int64_t row = share.first; row < share.stop; ++row) {
    const float* x = source(row);
    if (norm.size != 0) {
      apply(norm, norm.size, x, normed);
      x = normed;
    }
    inputs.set_row(row, x);
  }
  if (rows > 1) team_.meet();
  return inputs;
}
