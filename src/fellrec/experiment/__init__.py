"""From a composed configuration to the objects of a run. The only room where configuration meets classes."""
