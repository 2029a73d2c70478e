"""HTTP around the engine: the OpenAI and Anthropic protocols, faults and load survived."""
