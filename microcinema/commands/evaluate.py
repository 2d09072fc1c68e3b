"""The command `evaluate`: runs the protocol of the config and writes its numbers and a report, or compares several of them."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from microcinema.config.schema import Evaluate
from microcinema.evaluation.comparison import compare
from microcinema.evaluation.vbench import VBenchSuite, run_vbench
from microcinema.evaluation.zero_shot import run_zero_shot
from microcinema.sprites.evaluate import run_sprites
from microcinema.sprites.judge import load_video_features
from microcinema.sprites.protocol import SpritesProtocol
from microcinema.utils.device import set_precision
from microcinema.utils.logging import quieten_libraries

DETECTORS = {"sprites": load_video_features}
_TIMEOUT = timedelta(days=7)  # a process waits for as long as the clips of another take


def run(config: Evaluate) -> None:
    """Runs the protocol; all processes share its clips, and the first one prints the numbers and the report's path. A comparison prints its
    own. After a UserError finished clips are kept, and the next run continues from them."""
    if config.compare is not None:
        if os.environ.get("RANK", "0") == "0":
            print(compare(config.compare, config.output_dir))
        return
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=_TIMEOUT)
    # Figures are compared from one machine to another; torch_dtype is what makes generation fast.
    set_precision(allow_tf32=False)
    try:
        protocol = config.evaluation.protocol.build()
        quieten_libraries()
        if isinstance(protocol, SpritesProtocol):
            run_sprites(config, protocol, state)
        elif isinstance(protocol, VBenchSuite):
            run_vbench(config, protocol, state)
        else:
            run_zero_shot(config, protocol, state, DETECTORS)
    finally:
        state.destroy_process_group()
