"""The chat stage's parts: the conversation, the model that answers, the screen and the commands."""
