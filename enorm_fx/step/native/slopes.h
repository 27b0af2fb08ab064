// The step of a channel with three or more exponents, by Newton's method.

#pragma once

#include <cmath>

#include "tables.h"

namespace {

constexpr int MOST_SIDES = ENORM_MOST_SIDES;           // kinds of exponents in a group

// How J falls and rises with the step of one channel that has several exponents.
struct Slopes {
    const double* coefficients;                        // positive ones, then negative ones
    i64 positive, sides;
    bool largest;

    // log of one side's |slope| after a step of p * u, and the derivative of that log by the step.
    double of(const double* logs, double step, i64 from, i64 to, double& rate) const {
        double most = -INFINITY, total = 0, weighted = 0;
        double terms[MOST_SIDES];
        for (i64 s = from; s < to; s++) {
            double a = coefficients[s];
            terms[s] = logs[s] + a * step + (largest ? 0 : std::log(std::abs(a)));
            if (terms[s] > most) most = terms[s], rate = a;
        }
        if (largest || most == -INFINITY) return most;
        for (i64 s = from; s < to; s++) {
            double x = std::exp(terms[s] - most);
            total += x, weighted += x * coefficients[s];
        }
        rate = weighted / total;
        return most + std::log(total);
    }

    // Where both sides are equal: Newton, held in a bracket by bisection.
    double root(const double* logs) const {
        double up_rate = 1, down_rate = -1;
        double start = of(logs, 0, 0, positive, up_rate) - of(logs, 0, positive, sides, down_rate);
        double slowest = coefficients[0] - coefficients[sides - 1];   // the two nearest to zero
        double bound = -start / slowest, low = bound < 0 ? bound : 0, high = bound > 0 ? bound : 0;
        double step = 0;
        for (int k = 0; k < 60; k++) {
            double up = of(logs, step, 0, positive, up_rate);
            double down = of(logs, step, positive, sides, down_rate);
            double difference = up - down;
            if (difference < 0) low = step;
            if (difference > 0) high = step;
            double guess = step - difference / (up_rate - down_rate);
            step = guess >= low && guess <= high ? guess : (low + high) / 2;
        }
        return step;
    }
};

}  // namespace
