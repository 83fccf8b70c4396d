"""The work: roll out search episodes, train on them with GRPO; read `train.grpo` first."""
