"""How far a student's distribution over the vocabulary is from a teacher's, of two heads read together."""
