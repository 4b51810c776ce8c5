"""Reading of compiled programs, on texts of the form that libtpu writes."""

import pytest

from maxdiffusion.planning.schedule import Choice, Collective, Copy, Done, Kernel, Loop, Work, steps

HLO = """HloModule jit_f, is_scheduled=true, entry_computation_layout={()->()}

%fused_computation.1 (p: bf16[8,128]) -> bf16[8,128] {
  ROOT %convolution.1 = bf16[8,128]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

%fused_computation.2 (p: bf16[8,128]) -> bf16[8,128] {
  %q = bf16[8,128]{1,0} copy(%p)
  ROOT %inner = bf16[8,128]{1,0} fusion(%q), kind=kOutput, calls=%fused_computation.1
}

%async_computation.1 (p: bf16[8,128]) -> bf16[8,128] {
  ROOT %all-to-all.9 = bf16[8,128]{1,0} all-to-all(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%condition (p: (s32[], bf16[8,128])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(40)
  ROOT %less = pred[] compare(%i, %constant.1), direction=LT
}

%inner_condition (p: (s32[], bf16[8,128])) -> pred[] {
  %constant.2 = s32[] constant(3)
  ROOT %less.2 = pred[] fusion(%i, %constant.2), kind=kLoop, calls=%compare_computation
}

%inner_body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %add.1 = bf16[8,128]{1,0} add(%a, %a), backend_config={"estimated_cycles":"5"}
}

%yes (p: bf16[8,128]) -> bf16[8,128] {
  ROOT %copy.5 = bf16[8,128]{1,0} copy(%p), backend_config={"estimated_cycles":"70"}
}

%no (p: bf16[8,128]) -> bf16[8,128] {
  ROOT %nothing = bf16[8,128]{1,0} parameter(0)
}

%body.1_spmd (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %fusion.1 = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%a), kind=kOutput, calls=%fused_computation.2, backend_config={"flag_configs":[],"window_config":{},"estimated_cycles":"1000"}
  %collective-permute-start.1 = (bf16[1,9450,40,128]{3,1,0,2:T(8,128)(2,1)}, bf16[1,9450,40,128]{3,1,0,2:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=1, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  %copy-start.1 = (bf16[8,128]{1,0}, bf16[8,128]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%a), backend_config={"estimated_cycles":"99"}
  %flash_attention_256_512.3 = (bf16[1,2,512,128]{3,2,1,0:T(8,128)(2,1)}, f32[1,2,1,512]{3,2,1,0}) custom-call(%b, %c), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[1,2]{1,0}, bf16[1,2,512,128]{3,2,1,0}, bf16[1,2,1024,128]{3,2,1,0}, s32[]}, frontend_attributes={kernel_metadata={}}, metadata={op_name="f/pallas_call"}
  %custom-call.2 = bf16[8,128]{1,0} custom-call(%a), custom_call_target="ConcatBitcast"
  %collective-permute-done.1 = bf16[1,9450,40,128]{3,1,0,2:T(8,128)(2,1)} collective-permute-done(%collective-permute-start.1)
  %conditional.1 = bf16[8,128]{1,0} conditional(%i, %a, %a), branch_computations={%yes, %no}
  %while.2 = (s32[], bf16[8,128]{1,0}) while(%t), condition=%inner_condition, body=%inner_body
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %all-to-all-start.3 = ((bf16[8,128]{1,0}), bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) all-to-all-start(%a), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %all-to-all-done.3 = bf16[8,128]{1,0} all-to-all-done(%all-to-all-start.3)
  %all-to-all-start.4 = ((bf16[8,128]{1,0}), bf16[8,128]{1,0}) async-start(%a), calls=%async_computation.1
  %all-to-all-done.4 = bf16[8,128]{1,0} async-done(%all-to-all-start.4), calls=%async_computation.1
  %while.1 = (s32[], bf16[8,128]{1,0}) while(%t), condition=%condition, body=%body.1_spmd
  %concatenate.8 = bf16[16,128]{1,0:T(8,128)(2,1)} concatenate(%f, %g), dimensions={0}
  %all-gather.2 = f32[8,9450,64]{1,2,0:T(8,128)S(1)} all-gather(%f), channel_id=14, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %all-to-all.5 = (f32[4,2]{1,0}, f32[4,2]{1,0}) all-to-all(%f, %g), replica_groups={{0,1},{2,3}}
  %all-gather-start.7 = (f32[2,64]{1,0}, f32[8,64]{1,0}) all-gather-start(%f), replica_groups={{0,1,2,3}}
  %all-gather-done.7 = f32[8,64]{1,0} all-gather-done(%all-gather-start.7)
  ROOT %reduce-scatter.1 = f32[2,64]{1,0} reduce-scatter(%f), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%sum
}
"""  # noqa: E501


def test_a_program_is_read_in_order_of_issue_with_loops_branches_kernels_and_collectives():
    body = (
        Work("fusion.1", True, 1000),
        Collective("collective-permute", 9450 * 40 * 128 * 2, (0, 4), "collective-permute-start.1"),
        Kernel(
            "flash_attention_256_512",
            (
                ("s32", (1, 2)),
                ("bf16", (1, 2, 512, 128)),
                ("bf16", (1, 2, 1024, 128)),
                ("s32", ()),
            ),
        ),
        Done("collective-permute-start.1"),
        Choice(((Work("copy.5", False, 70),), ())),
        Loop(3, (Work("add.1", False, 5),)),
    )
    assert steps(HLO) == (
        Collective("all-to-all", 2048, (0, 2, 4, 6), "all-to-all-start.3"),
        Done("all-to-all-start.3"),
        Collective("all-to-all", 2048, (0, 1, 2, 3), "all-to-all-start.4"),
        Done("all-to-all-start.4"),
        Loop(40, body),
        Copy("concatenate.8", 16 * 128 * 2),
        Collective("all-gather", 8 * 9450 * 64 * 4, (0, 1, 2, 3)),
        Collective("all-to-all", 2 * 4 * 2 * 4, (0, 1)),
        Collective("all-gather", 8 * 64 * 4, (0, 1, 2, 3), "all-gather-start.7"),
        Done("all-gather-start.7"),
        Collective("reduce-scatter", 8 * 64 * 4, (0, 1, 2, 3)),
    )


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="not scheduled"):
        steps(HLO.replace("is_scheduled=true, ", ""))
    with pytest.raises(ValueError, match="no constant bound"):
        steps(HLO.replace("constant(40)", "parameter(0)"))
