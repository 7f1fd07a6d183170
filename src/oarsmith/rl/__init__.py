"""Reinforcement learning: prompts to completions, completions to rewards, rewards to advantages."""
