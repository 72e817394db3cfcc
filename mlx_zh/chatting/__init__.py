"""The parts of the chat: the conversation, the model that answers, the screen and the commands."""
