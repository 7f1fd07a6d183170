// A decoder as a list of operations on buffers. Python writes it from the decoder's spec (program.py); here are parts,
// not models. The structs are those of step.py's ctypes, field by field.
#pragma once
#include "activations.h"
#include "attention.h"
#include "matrix.h"

enum class Kind : int32_t {
  EMBED,    // target = keep * target + table[token] * scale + the row of `positions` for the token's place
  NORM,     // target = keep * target + norm(source), or the source itself
  LINEAR,   // y = W norm(source) + bias, then as `into` says
  ATTEND,   // target = attention of the source's queries, after its keys and values went into the cache
  HEADS,    // each of `count` pieces of the source times a matrix of its own: target's piece
  JOIN,     // target = the source's row before it in the sequence (0 where there is none), then its own
  EXPERTS,  // target = keep * target + the chosen experts' answers to source; `scores` are the router's
};

enum class Into : int32_t {
  STORE,     // target = activation(scale * y)
  ADD,       // target = keep * target + scale * y * (the row's number in `scores`, where that is a buffer)
  GATED,     // pairs of blocks are gate and up: target = activation(gate) * up
};

// How experts are chosen and what they are.
struct Experts {
  int64_t count, top_k;
  int32_t sigmoid, normalize;
  float scale;
  int32_t activation;
  float alpha, limit;
  int64_t groups, kept_groups, best_of_group;  // groups 0: none
  const float* correction;                     // [count], or null
  int64_t hidden;                              // the buffer between the two maps
  const Matrix *gate_up, *down;                // [count]
  const float *gate_up_bias, *down_bias;       // [count, padded rows], or null
};

struct Operation {
  Kind kind;
  Into into;
  int32_t source, target, scores;  // buffers; scores: -1 where there is none
  int32_t activation;
  float keep, scale, alpha, limit;
  Norm norm;
  Matrix matrix;
  const float* bias;       // [padded rows]; null: none
  const float* positions;  // [places, width]; null: none
  int64_t position_offset;
  int64_t target_offset;                     // of LINEAR: the first column
  int64_t count, source_step, target_step;   // of HEADS
  const Matrix* matrices;                    // [count]
  int64_t state;                             // of JOIN: its number
  const Attention* attention;
  const Experts* experts;
};

// cos and sin come from a set of frequencies; which one holds for a row may depend on lengths, and is said row by row.
struct RotationSpec {
  int64_t frequencies;
  const float* sets;  // [sets, frequencies]
  float factor;
  int32_t adjacent;
  int64_t of_blocks;    // turns by the second kind of position
};

struct StepSpec {
  int64_t threads, max_rows;
  int64_t num_buffers;
  const int64_t* widths;
  int32_t stream, head_input, logits;  // buffers: the hidden states, those that need logits, and the logits
  int64_t num_body, num_head;
  const Operation *body, *head;
  int64_t num_rotations;
  const RotationSpec* rotations;
  int64_t num_layers;
  const int64_t* cache_dims;  // [layers, 3]: kv heads, key dim, value dim
  Stored stored;
  CacheForm cache_form;
  const float* cache_scales;  // see Cache
  int64_t num_pages, page_size;
  int64_t num_states, num_slots;
  const int64_t* state_widths;
};
