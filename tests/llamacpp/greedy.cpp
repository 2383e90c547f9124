// What llama.cpp computes from a GGUF file: the ids of a text, the logits after a prompt, and the likeliest next tokens.
//
//   greedy MODEL tokenize TEXT_FILE
//   greedy MODEL generate COUNT ID,ID,... [ADAPTER]
//
// Attention, its cache and the matrix products of unquantised files are in 32-bit floats.

#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

static void fail(const char * what) {
    std::fprintf(stderr, "greedy: %s\n", what);
    std::exit(1);
}

static void print(const std::vector<llama_token> & ids) {
    for (size_t i = 0; i < ids.size(); i++) {
        std::printf("%s%d", i ? "," : "", ids[i]);
    }
    std::printf("\n");
}

static void tokenize(const llama_model * model, const char * path) {
    std::ifstream file(path, std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    std::vector<llama_token> ids(text.size() + 16);
    const int count = llama_tokenize(llama_model_get_vocab(model), text.data(), (int) text.size(), ids.data(),
                                     (int) ids.size(), /*add_special=*/true, /*parse_special=*/true);
    if (count < 0) {
        fail("cannot tokenize");
    }
    ids.resize(count);
    print(ids);
}

static void generate(llama_model * model, int count, const char * prompt, const char * adapter_path) {
    std::vector<llama_token> ids;
    std::stringstream stream(prompt);
    for (std::string id; std::getline(stream, id, ',');) {
        ids.push_back(std::atoi(id.c_str()));
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 128;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        fail("cannot make a context");
    }
    if (adapter_path) {
        llama_adapter_lora * adapter = llama_adapter_lora_init(model, adapter_path);
        float scale = 1.0f;
        if (!adapter || llama_set_adapters_lora(context, &adapter, 1, &scale) != 0) {
            fail("cannot load the adapter");
        }
    }
    const int size = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<llama_token> found;
    std::vector<float> first;
    llama_batch batch = llama_batch_get_one(ids.data(), (int) ids.size());
    llama_token next = 0;
    for (int i = 0; i < count; i++) {
        if (llama_decode(context, batch) != 0) {
            fail("cannot decode");
        }
        const float * logits = llama_get_logits_ith(context, -1);
        if (i == 0) {
            first.assign(logits, logits + size);
        }
        next = (llama_token) (std::max_element(logits, logits + size) - logits);
        found.push_back(next);
        batch = llama_batch_get_one(&next, 1);
    }
    print(found);
    for (int i = 0; i < size; i++) {
        std::printf("%s%.9g", i ? "," : "", first[i]);
    }
    std::printf("\n");
    llama_free(context);
}

int main(int argc, char ** argv) {
    if (argc < 4) {
        fail("usage: greedy MODEL tokenize FILE | greedy MODEL generate COUNT IDS [ADAPTER]");
    }
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) {
            std::fputs(text, stderr);
        }
    }, nullptr);
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    llama_model * model = llama_model_load_from_file(argv[1], params);
    if (!model) {
        fail("cannot load the model");
    }
    const std::string what = argv[2];
    if (what == "tokenize") {
        tokenize(model, argv[3]);
    } else if (what == "generate" && argc >= 5) {
        generate(model, std::atoi(argv[3]), argv[4], argc > 5 ? argv[5] : nullptr);
    } else {
        fail("unknown command");
    }
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
