"""The processes of a run: how they start, meet, agree, watch each other and stop."""
