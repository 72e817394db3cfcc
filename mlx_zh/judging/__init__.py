"""Which of several answers to a prompt is better: by rules, by a judge model, or by hand."""
