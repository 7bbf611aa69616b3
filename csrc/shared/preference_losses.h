// The preference losses: one row each, a name and an expression on dual numbers. preference_loss.h includes this file
// for the ids, for the names and for the values, and says what a row is written in.

// -log S(beta d). DPO, arXiv 2305.18290 eq. 7; smoothed: conservative DPO, ericmitchell.ai/cdpo.pdf eq. 3
LOSS(sigmoid, smoothed_log_loss(x, e))

// [-(1 - e) log S(beta d) + e log S(-beta d)] / (1 - 2e). Robust DPO, arXiv 2403.00409
LOSS(robust, e == T(0) ? -log_sigmoid(x) : ((e - T(1)) * log_sigmoid(x) + e * log_sigmoid(-x)) / (T(1) - T(2) * e))

// (s_w / n_w - s_l / n_l - 1 / (2 beta))^2. IPO, arXiv 2310.12036 eq. 17, per token
LOSS(ipo, square(s_w / n_w - s_l / n_l - T(0.5) / beta))

// relu(1 - beta d). RSO, arXiv 2309.06657
LOSS(hinge, relu(T(1) - x))

// S(beta d) [log S(beta d) - log(1 - e)] + S(-beta d) [log S(-beta d) - log e]. EXO, arXiv 2402.00856 eq. 16
LOSS(exo_pair, sigmoid(x) * (log_sigmoid(x) - ::log1p(-e)) + sigmoid(-x) * (log_sigmoid(-x) - ::log(e)))

// -log S(beta a) - log S(-beta a) / 2 - log S(-beta b) / 2. NCA, arXiv 2402.05369
LOSS(nca_pair, T(-0.5) * (log_sigmoid(-beta * a) + log_sigmoid(-beta * b)) - log_sigmoid(beta * a))

// -log S(beta a) - log S(-beta b). BCO without the running shift, arXiv 2404.04656
LOSS(bco_pair, -log_sigmoid(beta * a) - log_sigmoid(-beta * b))

// (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2. SPPO with hard labels, arXiv 2405.00675 eq. 4.7
LOSS(sppo_hard, square(a - T(0.5) / beta) + square(b + T(0.5) / beta))

// 1 - S(beta a) + S(beta b). APO-zero, arXiv 2408.06266 eq. 7
LOSS(apo_zero, sigmoid(-beta * a) + sigmoid(beta * b))

// S(beta a) + 1 - S(beta (a - b)). APO-down, arXiv 2408.06266 eq. 8
LOSS(apo_down, sigmoid(beta * a) + sigmoid(-beta * (a - b)))

// -log S(x) (1 - m) + e^-x m with x = beta d, m = S(x / tau). DiscoPOP, arXiv 2406.08414 eq. 5. e^-x and m overflow and
// vanish together: their exponents are added before either exists.
LOSS(discopop, exp(clamp_max(log_sigmoid(x / T(options.discopop_tau)) - x, T(kMaxExponent))) -
                   log_sigmoid(x) * sigmoid(-(x / T(options.discopop_tau))))

// -log S(beta (s_w / n_w - s_l / n_l)). Length-normalised DPO, arXiv 2411.15124
LOSS(sigmoid_norm, -log_sigmoid(beta * (s_w / n_w - s_l / n_l)))

// -log S(beta (chosen / n_w - rejected / n_l) - gamma), smoothed. SimPO, arXiv 2405.14734 eq. 6
LOSS(simpo, smoothed_log_loss(beta * (in.chosen / n_w - in.rejected / n_l) - T(options.simpo_gamma), e))

// -log S(beta (chosen - rejected)), smoothed. CPO's preference term, arXiv 2401.08417 eq. 3
LOSS(cpo, smoothed_log_loss(beta * (in.chosen - in.rejected), e))

// -beta log S(log odds_w - log odds_l), odds = p / (1 - p), p = e^(logp / n). ORPO's odds-ratio term, arXiv 2403.07691
// eqs. 4 and 7; its lambda is `beta`, as in TRL
LOSS(orpo, -beta * log_sigmoid(log_odds(in.chosen / n_w) - log_odds(in.rejected / n_l)))

// [lambda_D (1 - S(beta (a - KL))) + lambda_U (1 - S(beta (KL - b)))] / 2: the mean over the two sequences, as KTO
// averages over sequences. arXiv 2402.01306
LOSS(kto, T(0.5 * options.desirable_weight) * sigmoid(-beta * (a - T(options.kto_kl))) +
              T(0.5 * options.undesirable_weight) * sigmoid(beta * (b - T(options.kto_kl))))

// -log S(beta (a - b - lambda relu(-a))). DPO-positive, arXiv 2402.13228
LOSS(dpop, -log_sigmoid(beta * (a - b - T(options.dpop_lambda) * relu(-a))))

// relu(delta - beta (chosen - rejected)). SLiC-HF's rank loss, arXiv 2305.10425, where beta is 1
LOSS(slic, relu(T(options.slic_delta) - beta * (in.chosen - in.rejected)))

// -log S(beta (a - b - (k_l - k_w))). TDPO1, arXiv 2404.11999 eqs. 15 and 16
LOSS(tdpo1, -log_sigmoid(beta * (a - b - (k_l - k_w))))

// -log S(beta (a - b - alpha (k_l - k_w))), k_w without gradient. TDPO2, arXiv 2404.11999 eq. 17
LOSS(tdpo2, -log_sigmoid(beta * (a - b - T(options.tdpo_alpha) * (k_l - k_w.value))))
