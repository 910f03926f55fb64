// Integer products of few tokens on compute capability 9.0: y^T = w x^T, weights from registers, K cut in a cluster.
//
// A cluster of CK programs computes one tile of BN weights by BM tokens. K is shared out to its programs, and in each to
// TURNS groups of warps that take turns with stages. Each of these CK * TURNS owners finishes its own share of the
// tokens, in octets: groups of one program add theirs up in the place of the stages, programs store theirs into the
// owner's shared memory without asking. So a program leaves once it has been given what it waits for: nobody reads what
// it has, and what it sent is on its way. Sums are integers: no order, no other bits.
//
// Constants come from the command line: BM BN CK TURNS, STEP (blocks of 128 columns of a stage), STAGES, GROUPED ZERO
// BIAS, OUT (0 fp16, 1 bf16, 2 fp32) and PROGRAMS (that fit on a multiprocessor). `clusters.py` writes `multiply`.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

struct __align__(64) TensorMap { u64 words[16]; };

constexpr int SIDES = BN / 64;                        // groups of four warps beside each other, 64 weights each
constexpr int THREADS = SIDES * 128;                  // that have one tile of sums
constexpr int WORKERS = THREADS * TURNS;              // that multiply
constexpr int WEIGHTS = BN * 64;                      // bytes of a block
constexpr int TOKENS = BM * 128;
constexpr int PANELS = BN > 128 ? BN / 128 : 1;       // of 128 weights
constexpr int TAIL = GROUPED ? PANELS * 256 : 0;      // the groups' parameters
constexpr int TAIL_BYTES = GROUPED ? (BN < 128 ? 128 : TAIL) : 0;
constexpr int STAGE = STEP * (WEIGHTS + TOKENS);
constexpr int LINES = GROUPED ? 66 : 64;              // of 128 bytes, of a block of weights
constexpr int OWNERS = CK * TURNS;
constexpr int OCTETS = BM / 8;                        // of tokens
constexpr int MOST = (OCTETS + OWNERS - 1) / OWNERS;  // octets of one owner
constexpr int GIVEN = MOST * (CK - 1) * THREADS * 16;  // bytes that an owner is given by other programs, at most
constexpr int SHARED = TURNS > 1 ? TURNS * OCTETS * THREADS * 16 : 0;  // bytes that groups of a program exchange
constexpr int WIDTH = OUT == 2 ? 4 : 2;               // bytes of a result
constexpr int PITCH = BN * WIDTH + 16;                // bytes between the results of two tokens
constexpr int RESULTS = MOST * 8 * PITCH;             // bytes of an owner's results
constexpr int SUMS = SHARED + TURNS * RESULTS;        // bytes of what is exchanged, and of results
constexpr int RINGS = STAGES * (STAGE + STEP * TAIL);  // bytes of all stages
constexpr int PLACE = RINGS > SUMS ? RINGS : SUMS;    // first stages, then sums and results

__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive_if(u32 bar, bool wanted) {
  asm volatile("{\n.reg .pred P;\nsetp.ne.u32 P, %1, 0;\n@P mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(bar),
               "r"((u32)wanted) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 phase) {
  asm volatile(
      "{\n.reg .pred P;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1;\n"
      "@P bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(bar), "r"(phase) : "memory");
}
__device__ __forceinline__ void fetch_tile(u32 to, const TensorMap* map, int column, int row, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(bar) : "memory");
}
__device__ __forceinline__ void fetch_weights(u32 to, const TensorMap* map, int row, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], "
      "[%4], %5;" ::"r"(to), "l"(map), "r"(0), "r"(row), "r"(bar), "l"(0x12F0000000000000ull) : "memory");  // evict first
}
__device__ __forceinline__ void fetch_bytes(u32 to, const u8* from, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(bar) : "memory");
}
__device__ __forceinline__ void load_fragments(u32 (&r)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ u32 second_level(u32 codes, u32 scale, u32 offset) {
  return (codes * scale + offset) ^ 0x80808080u;
}
// Tokens lie in lines of 128 bytes, swizzled; eight of them follow each other after 1,024 bytes.
__device__ __forceinline__ u64 descriptor(u32 at) {
  return (u64)((at & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}
__device__ __forceinline__ u32 remote(u32 at, u32 rank) {
#if CK > 1
  u32 to;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(at), "r"(rank));
  return to;
#else
  return at;
#endif
}
__device__ __forceinline__ void give(u32 to, u32 bar, int a, int b, int c, int d) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
               ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d), "r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait_cluster(u32 bar, u32 phase) {
  asm volatile(
      "{\n.reg .pred P;\nAGAIN:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 P, [%0], %1;\n"
      "@P bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(bar), "r"(phase) : "memory");
}

// multiply

#if OUT == 2
typedef u32 Out;
__device__ __forceinline__ Out rounded(float v) { return __float_as_uint(v); }
#else
typedef unsigned short Out;
__device__ __forceinline__ Out rounded(float v) {
  Out r;
#if OUT == 1
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
#endif
  return r;
}
#endif

// (sum * scale - zero * total) * a + bias, each operation rounded: the expression of `linear.py`.
__device__ __forceinline__ Out finish(int sum, float scale, float zero, float bias, float total, float a) {
  float value = __fmul_rn(__int2float_rn(sum), scale);
  if (ZERO) value = __fsub_rn(value, __fmul_rn(zero, total));
  value = __fmul_rn(value, a);
  if (BIAS) value = __fadd_rn(value, bias);
  return rounded(value);
}

extern "C" __global__ void __launch_bounds__(WORKERS + 32, PROGRAMS)
product(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const u8* __restrict__ tail,
        Out* __restrict__ y, const float* __restrict__ a, const int* __restrict__ total, const float* __restrict__ scale,
        const float* __restrict__ zero, const float* __restrict__ bias, int M, int N, int blocks) {
  extern __shared__ u8 raw[];
  __shared__ __align__(8) u64 barriers[2 * STAGES + TURNS];
  __shared__ float2 of_token[BM];  // scale and sum of codes
  const u32 base = (address(raw) + 1023) & ~1023u;
  const u32 tails = base + STAGES * STAGE, mailboxes = base + PLACE;
  const u32 full = address(barriers), empty = full + 8 * STAGES, given = empty + 8 * STAGES;
  const int part = CK > 1 ? blockIdx.x % CK : 0;      // the rank within the cluster
  const int tiles_m = (M + BM - 1) / BM;
  const int tile_m = blockIdx.x / CK % tiles_m, tile_n = blockIdx.x / CK / tiles_m;
  const int steps = (blocks + STEP - 1) / STEP;
  const int first = part * steps / CK, count = (part + 1) * steps / CK - first;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // The next kernel may begin as soon as there is room: it fetches its own weights and waits for what is written here.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  const int panel = tile_n * BN / 128;
  auto fetch = [&](int i, int s) {  // weights
    const u32 bar = full + 8 * s;
    barrier_expect(bar, STAGE + STEP * TAIL_BYTES);
    for (int inner = 0; inner < STEP; ++inner)
      for (int p = 0; p < PANELS; ++p) {
        // Tokens behind the last block are zeros, its weights may stand there twice.
        const int block = (panel + p) * blocks + min((first + i) * STEP + inner, blocks - 1);
        fetch_weights(base + s * STAGE + inner * WEIGHTS + p * 8192, &w, block * LINES + tile_n * BN % 128 / 2, bar);
        if (GROUPED) {
          const u8* from = tail + (u64)block * (LINES * 128) + 8192 + tile_n * BN % 128;
          const u32 to = tails + (s * STEP + inner) * TAIL + p * 256;
          if (BN >= 128) {
            fetch_bytes(to, from, 256, bar);
          } else {
            fetch_bytes(to, from, 64, bar);
            fetch_bytes(to + 128, from + 128, 64, bar);
          }
        }
      }
  };
  auto fetch_tokens = [&](int i, int s) {
    for (int inner = 0; inner < STEP; ++inner)
      fetch_tile(base + s * STAGE + STEP * WEIGHTS + inner * TOKENS, &x, ((first + i) * STEP + inner) * 128, tile_m * BM, full + 8 * s);
  };
  const int early = min(count, STAGES);
  if (warp == WORKERS / 32) {
    if (lane == 0) {
      for (int s = 0; s < STAGES; ++s) {
        barrier_init(full + 8 * s, 1);
        barrier_init(empty + 8 * s, 4 * SIDES);
      }
      for (int t = 0; t < TURNS; ++t) {
        const int owner = part * TURNS + t;
        barrier_init(given + 8 * t, 1);
        if (CK > 1)
          barrier_expect(given + 8 * t, ((owner + 1) * OCTETS / OWNERS - owner * OCTETS / OWNERS) * (CK - 1) * THREADS * 16);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      // Weights, which no kernel before this one writes, are asked for before it ends.
      for (int i = 0; i < early; ++i) fetch(i, i);
      asm volatile("prefetch.tensormap [%0];" ::"l"(&x) : "memory");
    }
    __syncwarp();
  }
  __syncthreads();
#if CK > 1
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");  // after the fence above: no other is waited for
#endif
  if (warp == WORKERS / 32) {
    if (lane == 0) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      for (int i = 0; i < early; ++i) fetch_tokens(i, i);
      for (int i = STAGES, s = 0, phase = 0; i < count; ++i) {
        barrier_wait(empty + 8 * s, phase);
        fetch(i, s);
        fetch_tokens(i, s);
        if (++s == STAGES) s = 0, phase ^= 1;
      }
    }
    return;
  }

  // A warp has 16 weights: two of them in a line of 128 bytes, its pieces of 16 bytes swizzled.
  const int turn = warp / (4 * SIDES);
  const int rows = warp % (4 * SIDES) * 16;
  const int mine = rows + lane % 8 + (lane / 8 % 2) * 8;  // the weight whose piece this thread points to
  const u32 line = mine / 2 * 128, piece = mine % 2 * 4 + lane / 16, turned = mine / 2 % 8;
  const u32 even = line + ((piece ^ turned) << 4), odd = line + (((piece + 2) ^ turned) << 4);
  const u32 group_at = tails + (BN > 128 ? rows / 128 * 256 + rows % 128 : rows) + lane / 4;

  float sv[2], zv[2] = {}, bv[2] = {};  // of the two weights whose sums this thread has
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int n = min(tile_n * BN + rows + lane / 4 + 8 * j, N - 1);  // what is outside is not stored
    sv[j] = scale[n];
    if (ZERO) zv[j] = zero[n];
    if (BIAS) bv[j] = bias[n];
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
  for (int m = threadIdx.x; m < BM; m += WORKERS) {
    const int there = min(tile_m * BM + m, M - 1);
    of_token[m] = make_float2(a[there], ZERO ? __int2float_rn(total[there]) : 0.0f);
  }

  int acc[BM / 2];
#pragma unroll
  for (int i = 0; i < BM / 2; ++i) acc[i] = 0;

  auto unpack = [&](u32 (&to)[4][4], u32 here, u32 at) {  // weights of one block, 32 columns each
    load_fragments(to[0], here + even);
    load_fragments(to[1], here + odd);
    u32 s0 = 0, s1 = 0, o0 = 0, o1 = 0;
    if (GROUPED) {
      asm volatile("ld.shared.u8 %0, [%1];" : "=r"(s0) : "r"(at) : "memory");
      asm volatile("ld.shared.u8 %0, [%1];" : "=r"(s1) : "r"(at + 8) : "memory");
      asm volatile("ld.shared.u8 %0, [%1];" : "=r"(o0) : "r"(at + 128) : "memory");
      asm volatile("ld.shared.u8 %0, [%1];" : "=r"(o1) : "r"(at + 136) : "memory");
      o0 *= 0x01010101u;
      o1 *= 0x01010101u;
    }
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        to[k + 2][j] = (to[k][j] >> 4) & 0x0F0F0F0Fu;
        to[k][j] = to[k][j] & 0x0F0F0F0Fu;
        if (GROUPED) {
          to[k + 2][j] = second_level(to[k + 2][j], j % 2 ? s1 : s0, j % 2 ? o1 : o0);
          to[k][j] = second_level(to[k][j], j % 2 ? s1 : s0, j % 2 ? o1 : o0);
        }
      }
  };
  int s = turn, phase = 0;
  for (int i = turn; i < count; i += TURNS) {
    barrier_wait(full + 8 * s, phase);
    u32 held[STEP][4][4];
#pragma unroll
    for (int inner = 0; inner < STEP; ++inner) {
      unpack(held[inner], base + s * STAGE + inner * WEIGHTS, group_at + (s * STEP + inner) * TAIL);
      const u64 tokens = descriptor(base + s * STAGE + STEP * WEIGHTS + inner * TOKENS);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      multiply(acc, held[inner][0], tokens);
      multiply(acc, held[inner][1], tokens + 2);
      multiply(acc, held[inner][2], tokens + 4);
      multiply(acc, held[inner][3], tokens + 6);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int inner = 0; inner < STEP; ++inner)  // until here these registers are read: none may hold anything else
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" ::"r"(held[inner][k][j]));
    barrier_arrive_if(empty + 8 * s, lane == 0);
    s += TURNS;
    if (s >= STAGES) s -= STAGES, phase ^= 1;
  }

  const int thread = threadIdx.x % THREADS;
  const int me = part * TURNS + turn;
  auto wait_for_all = [&]() { asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory"); };
  auto load_sums = [&](int q, u32 at) {
    int4 v;
    asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    acc[4 * q] += v.x, acc[4 * q + 1] += v.y, acc[4 * q + 2] += v.z, acc[4 * q + 3] += v.w;
  };
  wait_for_all();  // what was fetched has been read: its place is free; and scales of tokens are there
#if TURNS > 1
#pragma unroll
  for (int q = 0; q < OCTETS; ++q)
    if (((q + 1) * OWNERS - 1) / OCTETS % TURNS != turn)
      asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(base + ((turn * OCTETS + q) * THREADS + thread) * 16),
                   "r"(acc[4 * q]), "r"(acc[4 * q + 1]), "r"(acc[4 * q + 2]), "r"(acc[4 * q + 3]) : "memory");
  wait_for_all();
#pragma unroll
  for (int q = 0; q < OCTETS; ++q)
    if (((q + 1) * OWNERS - 1) / OCTETS % TURNS == turn)
#pragma unroll
      for (int other = 1; other < TURNS; ++other)
        load_sums(q, base + (((turn + other) % TURNS * OCTETS + q) * THREADS + thread) * 16);
#endif
#if CK > 1
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // all have begun: their barriers are there
#pragma unroll
  for (int q = 0; q < OCTETS; ++q) {
    const int owner = ((q + 1) * OWNERS - 1) / OCTETS;  // the one whose share of octets has this one
    const int local = q - owner * OCTETS / OWNERS, there = owner / TURNS;
    if (owner % TURNS == turn && there != part)
      give(remote(mailboxes + turn * GIVEN + ((local * (CK - 1) + part - (part > there)) * THREADS + thread) * 16, there),
           remote(given + 8 * turn, there), acc[4 * q], acc[4 * q + 1], acc[4 * q + 2], acc[4 * q + 3]);
  }
  barrier_wait_cluster(given + 8 * turn, 0);
#endif
  const u32 results = base + SHARED + turn * RESULTS;
#pragma unroll
  for (int q = 0; q < OCTETS; ++q) {
    const int owner = ((q + 1) * OWNERS - 1) / OCTETS;
    const int local = q - owner * OCTETS / OWNERS;
    if (owner == me) {
#pragma unroll
      for (int sender = 0; sender < CK - 1; ++sender)
        load_sums(q, mailboxes + turn * GIVEN + ((local * (CK - 1) + sender) * THREADS + thread) * 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 of = of_token[q * 8 + lane % 4 * 2 + j % 2];
        const Out v = finish(acc[4 * q + j], sv[j / 2], zv[j / 2], bv[j / 2], of.y, of.x);
        const u32 at = results + (local * 8 + lane % 4 * 2 + j % 2) * PITCH + (rows + lane / 4 + j / 2 * 8) * WIDTH;
        if (OUT == 2) asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"((u32)v) : "memory");
        else asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"((unsigned short)v) : "memory");
      }
    }
  }
  asm volatile("bar.sync %0, %1;" ::"r"(2 + turn), "r"(THREADS) : "memory");
  const int begin = me * OCTETS / OWNERS * 8, tokens_here = (me + 1) * OCTETS / OWNERS * 8 - begin;
  constexpr int PIECES = BN * WIDTH / 16;  // of 16 bytes, of one token's results
  for (int i = thread; i < tokens_here * PIECES; i += THREADS) {
    const int m = tile_m * BM + begin + i / PIECES, n = tile_n * BN + i % PIECES * (16 / WIDTH);
    int4 v;
    asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(results + i / PIECES * PITCH + i % PIECES * 16) : "memory");
    if (m < M && n < N) *reinterpret_cast<int4*>(y + (u64)m * N + n) = v;
  }
}
