"""What the helper functions mean that TVM wraps around PTX instructions: a C++ body for each, by the helper's name.

TVM emits ``__forceinline__ __device__ void tvm_builtin_ptx_mma_sync_...(float& d0, ...) { asm volatile(...); }``; the name says
the instruction and the parameters are its operands in PTX order, so the body can be written without reading the asm.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Args = list[str]
Body = Callable[[re.Match[str], Args], str]

_ADDRESS = "(const void*)(uintptr_t)"


def _mma(m: re.Match[str], a: Args) -> str:
    f16 = "true" if "_f16_f16_" in m.string else "false"
    return (
        f"float d[4],c[4]={{{','.join(a[10:14])}}}; uint32_t A[4]={{{','.join(a[4:8])}}},B[2]={{{a[8]},{a[9]}}};"
        f"emu_mma_m16n8k16_bf16(d,A,B,c,{f16}); {a[0]}=d[0];{a[1]}=d[1];{a[2]}=d[2];{a[3]}=d[3];"
    )


def _descriptor(_: re.Match[str], a: Args) -> str:
    return (
        f"uint64_t l=({a[4]}==3)?1:({a[4]}==2)?2:({a[4]}==1)?3:0;*{a[0]}=(uint64_t)((((uintptr_t){a[1]})>>4)&0x3fff)"
        f"|((uint64_t)({a[2]}&0x3fff)<<16)|((uint64_t)({a[3]}&0x3fff)<<32)|(l<<62);"
    )


def _load_vector(_: re.Match[str], a: Args) -> str:
    return "".join(f"memcpy(&{v},(const char*)(uintptr_t){a[-1]}+{i}*sizeof({v}),sizeof({v}));" for i, v in enumerate(a[:-1]))


def _store_vector(_: re.Match[str], a: Args) -> str:
    return "".join(f"{{auto v={v};memcpy((char*)(uintptr_t){a[0]}+{i}*sizeof(v),&v,sizeof(v));}}" for i, v in enumerate(a[1:]))


def _half_pair(_: re.Match[str], a: Args) -> str:
    return f"half h[2]={{(half){a[2]},(half){a[1]}}};memcpy(&{a[0]},h,4);"


def _pair_multiply_add(m: re.Match[str], a: Args) -> str:
    """On pairs of 16-bit numbers, each rounded once."""
    kind, widen, narrow = ("half", "(float)h", "(half)") if m[1] == "f16" else ("uint16_t", "b2f(h)", "f2b")
    return (
        f"{kind} p[3][2];uint32_t u[3]={{{a[1]},{a[2]},{a[3]}}};memcpy(p,u,12);{kind} r[2];"
        f"auto w=[]({kind} h){{return {widen};}};"
        f"for(int i=0;i<2;i++)r[i]={narrow}((float)((double)w(p[0][i])*w(p[1][i])+w(p[2][i])));memcpy(&{a[0]},r,4);"
    )


def _ldmatrix(m: re.Match[str], a: Args) -> str:
    count, trans = int(m[1]), "true" if m[2] else "false"
    return f"uint32_t* d[4]={{{','.join('&' + v for v in a[:count])}}};emu_ldmatrix(d,{count},{trans},{_ADDRESS}{a[count]});"


def _stmatrix(m: re.Match[str], a: Args) -> str:
    count, trans = int(m[1]), "true" if m[2] else "false"
    return f"uint32_t d[4]={{{','.join(a[1 : 1 + count])}}};emu_stmatrix(d,{count},{trans},(void*)(uintptr_t){a[0]});"


def _tma_load(m: re.Match[str], a: Args) -> str:
    rank = int(m[1])
    coordinates = f"int c[5]={{{','.join(a[2 : 2 + rank])}}};"
    if "multicast" in m.string:
        return coordinates + (
            f"for(int r=0;r<emu_blocks();r++) if(({a[3 + rank]}>>r)&1) emu_tma_load(emu_mapa((uint32_t)(uintptr_t){a[0]},r),"
            f"(const void*){a[1]},c,{rank},emu_mapa((uint32_t)(uintptr_t){a[2 + rank]},r));"
        )
    return (
        coordinates + f"emu_tma_load((uint32_t)(uintptr_t){a[0]},(const void*){a[1]},c,{rank},(uint32_t)(uintptr_t){a[2 + rank]});"
    )


def _tma_store(m: re.Match[str], a: Args) -> str:
    rank = int(m[1])
    return (
        f"int c[5]={{{','.join(a[1 : 1 + rank])}}};emu_tma_store((const void*){a[0]},c,{rank},(uint32_t)(uintptr_t){a[1 + rank]});"
    )


def _wgmma(m: re.Match[str], a: Args) -> str:
    f16, columns = "true" if m[1] == "f16" else "false", int(m[3])
    count = columns // 2
    signs = re.search(r"(?:_(m?1))(?:_(m?1))((?:_[01])*)$", m.string)
    transposed = [int(x) for x in signs[3].split("_") if x] if signs else []
    accumulators = "float* d[128]={" + ",".join("&" + v for v in a[:count]) + "};"
    if m[2] == "ss":
        b, scale = a[count + 1], a[count + 2]
        return accumulators + f"emu_wgmma(d,{columns},0,{a[count]},{b},{scale},{transposed[0]},{transposed[1]},{f16});"
    fragment = f"uint32_t A[4]={{{','.join(a[count : count + 4])}}};"
    return accumulators + fragment + f"emu_wgmma(d,{columns},A,0,{a[count + 4]},{a[count + 5]},0,{transposed[0]},{f16});"


def _arrive_count(a: Args) -> str:
    return a[1] if len(a) > 1 else "1"


NOTHING = (
    "ptx_griddep", "ptx_fence", "ptx_prefetch", "ptx_setmaxnreg", "ptx_wgmma_fence", "ptx_cp_async_bulk_prefetch", "wgmma_fence",
    "barrier_cluster_arrive", "commit_group", "wait_group", "ptx_cp_async_wait", "ptx_cp_async_commit",
)  # fmt: skip
"""Instructions that order memory or hint: copies of the emulator are complete when issued."""

TABLE: list[tuple[str, Body]] = [
    (r"ptx_mma_sync_aligned_m16n8k16", _mma),
    (r"ptx_wgmma_encode_matrix_descriptor", _descriptor),
    (r"cuda_cvta_generic_to_shared", lambda m, a: f"return (unsigned)(uintptr_t){a[0]};"),
    (r"ptx_createpolicy", lambda m, a: f"{a[0]}=0;"),
    (r"ptx_ld_.*v[248]", _load_vector),
    (r"ptx_ld_", lambda m, a: f"memcpy(&{a[0]},{_ADDRESS}{a[1]},sizeof({a[0]}));"),
    (r"ptx_st_.*v[248]", _store_vector),
    (r"ptx_st_", lambda m, a: f"auto v={a[1]};memcpy((void*)(uintptr_t){a[0]},&v,sizeof(v));"),
    (r"ptx_lop3_b32_(\d+)", lambda m, a: f"{a[0]}=emu_lop3({a[1]},{a[2]},{a[3]},{m[1]});"),
    (r"ptx_mul_half_bf16x2", lambda m, a: f"{a[0]}=emu_bf2({a[1]},{a[2]},'*');"),
    (r"ptx_sub_half_bf16x2", lambda m, a: f"{a[0]}=emu_bf2({a[1]},{a[2]},'-');"),
    (r"ptx_fma_half_rn_(f16|bf16)x2", _pair_multiply_add),
    (r"ptx_prmt", lambda m, a: f"emu_prmt({a[0]},{a[1]},{a[2]},{a[3]});"),
    (r"ptx_cvt_bf16x2_f32", lambda m, a: f"{a[0]}=((uint32_t)f2b({a[1]})<<16)|f2b({a[2]});"),
    (r"ptx_cvt_f16x2_f32", _half_pair),
    (r"ptx_ex2", lambda m, a: f"{a[0]}=exp2f({a[1]});"),
    (r"ptx_rcp", lambda m, a: f"{a[0]}=1.0f/{a[1]};"),
    (r"ptx_rsqrt", lambda m, a: f"{a[0]}=1.0f/sqrtf({a[1]});"),
    (r"ptx_tanh", lambda m, a: f"{a[0]}=tanhf({a[1]});"),
    (r"cluster_ctaid", lambda m, a: "return emu_rank();"),
    (r"ptx_barrier_cluster_wait", lambda m, a: "emu_cluster_sync();"),
    (r"cuda_cluster_sync", lambda m, a: "emu_cluster_sync();"),
    (r"ptx_mapa", lambda m, a: f"{a[0]}=emu_mapa((uint32_t)(uintptr_t){a[1]},{a[2]});"),
    (r"cuda_cta_sync", lambda m, a: "__syncthreads();"),
    (r"cuda_warp_sync", lambda m, a: "__syncwarp();"),
    (r"cuda_warpgroup_sync", lambda m, a: f"emu_barrier({a[0] if a else '1'},128);"),
    (r"ptx_bar(?:rier)?_(?:cta_)?sync", lambda m, a: f"emu_barrier({','.join(a[:2])});"),
    (r"ptx_bar(?:rier)?_(?:cta_)?arrive", lambda m, a: f"emu_barrier_arrive({a[0]},{a[1]});"),
    (r"ptx_ldmatrix_sync_aligned_m8n8_x(\d)(_trans)?", _ldmatrix),
    (r"ptx_stmatrix_sync_aligned_m8n8_x(\d)(_trans)?", _stmatrix),
    (r"ptx_mbarrier_init", lambda m, a: f"emu_mb_init((void*)(uintptr_t){a[0]},{a[1]});"),
    (r"ptx_mbarrier_arrive_expect_tx", lambda m, a: f"emu_mb_expect((void*)(uintptr_t){a[0]},{a[1]});"),
    (r"ptx_mbarrier_arrive", lambda m, a: f"emu_mb_arrive((void*)(uintptr_t){a[0]},{_arrive_count(a)});"),
    (r".*mbarrier_wait", lambda m, a: f"emu_mb_wait((void*)(uintptr_t){a[0]},{a[1]});"),
    (r"ptx_cp_async_bulk_tensor_g2s.*?_(\d)d", _tma_load),
    (r"ptx_cp_async_bulk_tensor_s2g.*?_(\d)d", _tma_store),
    (
        r"ptx_cp_async_bulk_g2s",
        lambda m, a: f"memcpy((void*)(uintptr_t){a[0]},(const void*){a[1]},{a[2]});emu_mb_tx((uint32_t)(uintptr_t){a[3]},{a[2]});",
    ),
    (r"ptx_cp_async", lambda m, a: f"memcpy((void*)(uintptr_t){a[0]},(const void*){a[1]},16);"),
    (r"ptx_wgmma_(bf16|f16)_(ss|rs)_mma_async_sync_aligned_m64n(\d+)k16", _wgmma),
    (
        r"ptx_atom.*add",
        lambda m, a: f"{a[0]}=*(decltype(+{a[2]})*)(uintptr_t){a[1]};*(decltype(+{a[2]})*)(uintptr_t){a[1]}+={a[2]};",
    ),
    (r"ptx_red.*add", lambda m, a: f"*(decltype(+{a[1]})*)(uintptr_t){a[0]}+={a[1]};"),
]


def body(name: str, signature: str) -> str | None:
    """The C++ body of helper ``name`` with parameter list ``signature``, or None for an instruction that is not known."""
    name = name.removeprefix("tvm_builtin_")
    args = [p.strip().split()[-1].lstrip("&*") for p in signature.split(",") if p.strip()]
    for pattern, make in TABLE:
        match = re.match(pattern, name)
        if match and not any(part in name for part in NOTHING):
            return make(match, args)
    if any(part in name for part in NOTHING):
        return ""
    return None
