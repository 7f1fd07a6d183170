"""What answers are worth: functions, reward models, servers and verifiers behind one ``Rewards``."""
