"""The denoise loop and the strategies that vary it: schedule, solver, guidance, experts, step cache."""
