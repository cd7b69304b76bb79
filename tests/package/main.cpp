// One decode step over two cached keys with equal logits: the result is the mean of their values.
#include <dca/dca.h>

#include <cstdio>

int main() {
  const float q[4] = {}, k[8] = {}, v[8] = {1, 2, 3, 4, 3, 4, 5, 6}, cos[2] = {1, 1}, sin[2] = {};
  float out[4] = {};
  dca::AttentionParams p;
  p.chunk = {1, 1};
  p.batch = p.num_heads = p.num_heads_kv = 1;
  p.head_dim = 4;
  p.seqlen_q = 1;
  p.seqlen_k = p.cache_seqlen = 2;
  p.q = {q, {4, 4, 4}};
  p.k = {k, {8, 4, 4}};
  p.v = {v, {8, 4, 4}};
  p.out = {out, {4, 4, 4}};
  p.rotary = {cos, sin, 2, 1, false};
  const dca::Status status = dca::attention(p);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
  std::printf("%g %g %g %g, version %s\n", out[0], out[1], out[2], out[3], dca::build_info().version);
  return status.ok() ? 0 : 1;
}
